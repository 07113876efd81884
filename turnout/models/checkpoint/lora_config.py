"""``adapter_config.json`` of a LoRA adapter: which settings are known, and what each means for the factors."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from turnout.models.checkpoint.patterns import Hard, Patterns

__all__ = ["LoraSettings"]

# Settings that say nothing about what an adapter of these tensors computes: how it was trained, by whom and from what
# start, or, as fan_in_fan_out, how the map stores its weight, which ``attach`` looks at itself.
_FREE = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "lora_dropout",
        "lora_ga_config",
        "loftq_config",
        "megatron_core",
        "merge_weights",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    }
)
# Settings that are read below.
_READ = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
# Settings under which an adapter is something else than B A x: they must be off; in words what they would mean.
_OFF: Mapping[str, str] = {
    "alora_invocation_tokens": "an adapter that starts at a token",
    "arrow_config": "a choice of other adapters by Arrow, whose names are not in this folder",
    "enable_lora": "factors of some parts of a fused map only",
    "ensure_weight_tying": "adapters that tied embeddings share",
    "kasa_config": "singular values beside the factors, and another base",
    "layer_replication": "layers used several times",
    "lora_bias": "a bias of its own",
    "megatron_config": "maps of Megatron, cut over devices",
    "modules_to_save": "whole modules trained beside the adapter",
    "monteclora_config": "factors drawn anew at every call",
    "target_parameters": "adapted parameters that are no linear layer, such as fused experts",
    "trainable_token_indices": "trained token embeddings",
    "use_bdlora": "block-diagonal factors",
    "use_dora": "DoRA, which also rescales the base weight",
    "use_qalora": "a quantised input",
    "velora_config": "a compressed input",
}
# How the factors started. These leave the base weights as they are; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change them,
# so that their adapters mean something on that changed base alone.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_HEADS = ("lm_head", "embed_out", "output_layer")
_Bad = Callable[[str, object, str, str], NoReturn]


class LoraSettings:
    """The settings of one LoRA adapter, every one of them known to mean what is done here.

    Args:
        config: what ``adapter_config.json`` holds.
        bad: raises the error, from what is wrong, what was got, what is allowed, and the fix.

    >>> def bad(what, got, allowed, fix):
    ...     raise ValueError(what)
    >>> settings = LoraSettings({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}, bad)
    >>> settings.scale("layers.0.q_proj", 4), settings.targeted("layers.0.k_proj")
    (2.0, False)

    Source: Hu et al., 2021, "LoRA"; the fields of PEFT's ``LoraConfig``, 0.1 to 0.21.
    """

    def __init__(self, config: Mapping[str, Any], bad: _Bad) -> None:
        self._config, self._bad, self._patterns = config, bad, Patterns()
        kind = str(config.get("peft_type"))
        if kind.upper() != "LORA":
            bad("peft_type", kind, "be LORA", "train a LoRA adapter")
        for name, value in config.items():
            if value and name in _OFF:
                bad(name, f"{value!r} ({_OFF[name]})", "be off", f"train the adapter without {name}")
            if value and name not in _FREE and name not in _READ:
                fix = "remove it from adapter_config.json if it changes nothing about what the adapter computes"
                bad(name, repr(value), "be a setting that is known here", fix)
        self._plain()
        self._numbers()
        self._names()

    @property
    def base(self) -> str | None:
        """The model it was trained on, as the configuration names it."""
        name = self._config.get("base_model_name_or_path") or None
        if name is not None and not isinstance(name, str):
            self._bad("base_model_name_or_path", repr(name), "be a name", "write the base model's name there")
        return name

    @property
    def starts_at_nothing(self) -> bool:
        """Whether factors that a folder lacks are those of an adapter that adds nothing, as PEFT starts them."""
        return self._config.get("init_lora_weights", True) is not False

    def scale(self, module: str, rank: int) -> float:
        """Alpha / r, or alpha / sqrt(r) for rsLoRA, with the patterns of PEFT: the end of the module's name decides."""
        stated = self._of("rank_pattern", module, "r")
        if stated != rank:
            got = f"{rank} at {module}, where the configuration says {stated}"
            self._bad("the rank", got, "be what adapter_config.json says", "restore that file of this adapter")
        alpha = float(self._of("alpha_pattern", module, "lora_alpha"))
        return alpha / math.sqrt(rank) if self._config.get("use_rslora") else alpha / rank

    def targeted(self, module: str) -> bool:
        """Whether PEFT would put the adapter at a linear map of that name: it ignores factors of any other."""
        excluded = self._config.get("exclude_modules") or ()
        if self._match("exclude_modules", excluded, module):
            return False
        wanted = self._config["target_modules"]
        if wanted == "all-linear":
            return module.rpartition(".")[2] not in _HEADS
        if not self._match("target_modules", wanted, module):
            return False
        layers = self._config.get("layers_to_transform")
        exact = isinstance(wanted, str) or module in wanted
        return exact or layers is None or layers == [] or self._layer(module) in _several(layers)

    def _match(self, field: str, wanted: str | Sequence[str], module: str) -> bool:
        if isinstance(wanted, str):
            return self._try(field, self._patterns.whole, wanted, module)
        return any(module == one or module.endswith(f".{one}") for one in wanted)

    def _layer(self, module: str) -> int | None:
        """The number of the layer that the module is in, by PEFT's rules."""
        for pattern in _several(self._config.get("layers_pattern") or ["[^.]*"]):
            before = r".*?\." if pattern == "[^.]*" else r"(?:^|.*?\.)"
            if found := re.match(rf"{before}{pattern}\.(\d+)\.", module):
                return int(found[1])
        return None

    def _of(self, field: str, module: str, otherwise: str) -> Any:
        for pattern, value in (self._config.get(field) or {}).items():
            if self._try(field, self._patterns.ends, pattern, module):
                return value
        return self._config.get(otherwise, 8)

    def _try(self, field: str, match: Callable[[str, str], bool], pattern: str, module: str) -> bool:
        try:
            return match(pattern, module)
        except Hard as error:
            got = f"{pattern[:80]!r}: {error}"
            allowed = "hold regular expressions of characters, classes, choices and repeats, quick to match"
            self._bad(field, got, allowed, "write the names of the modules in full")

    def _plain(self) -> None:
        """The settings of one value each."""
        config = self._config
        start = config.get("init_lora_weights", True)
        if not any(start is one or (isinstance(one, str) and start == one) for one in _STARTS):
            got = f"{start!r}, which may change the base weights: its factors are a difference from that other base"
            allowed = f"be one of {', '.join(map(str, _STARTS))}"
            fix = "save the adapter with PEFT's path_initial_model_for_weight_conversion, or merge it into its own base"
            self._bad("init_lora_weights", got, allowed, fix)
        if config.get("bias") not in ("none", None):
            got = f"{config['bias']!r} (trained biases of the base model)"
            self._bad("bias", got, "be 'none'", "train the adapter with bias='none'")
        if not isinstance(config.get("use_rslora"), bool | None):
            self._bad("use_rslora", repr(config["use_rslora"]), "be true or false", "write true or false")

    def _numbers(self) -> None:
        """Ranks and alphas, wherever they are."""
        fix = "restore adapter_config.json of this adapter"
        for field, otherwise in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            patterns = self._config.get(field)
            if not isinstance(patterns, dict | None):
                self._bad(field, repr(patterns), "be an object of patterns", fix)
            every = {f"{field}[{pattern!r}]": value for pattern, value in (patterns or {}).items()}
            for name, value in {otherwise: self._config.get(otherwise, 8), **every}.items():
                if otherwise == "r" and (type(value) is not int or value < 1):
                    self._bad(name, repr(value), "be a whole number of 1 or more", fix)
                if otherwise == "lora_alpha" and not _finite(value):
                    self._bad(name, repr(value), "be a finite number", fix)

    def _names(self) -> None:
        """What says which modules: strings, or lists of them."""
        fix = "restore adapter_config.json of this adapter"
        for field in ("target_modules", "exclude_modules", "layers_pattern"):
            value = self._config.get(field)
            strings = isinstance(value, list) and all(isinstance(one, str) for one in value)
            if value is not None and not isinstance(value, str) and not strings:
                self._bad(field, repr(value), "be a name, or a list of names", fix)
        if self._config.get("target_modules") is None:
            self._bad("target_modules", "none", "say which modules are adapted", fix)
        for pattern in _several(self._config.get("layers_pattern") or []):
            if not re.fullmatch(r"[\w-]+", pattern):
                self._bad("layers_pattern", repr(pattern), "be the name of a list of layers", "write such as 'layers'")
        layers = self._config.get("layers_to_transform")
        if layers is not None and not all(type(one) is int for one in _several(layers)):
            self._bad("layers_to_transform", repr(layers), "be numbers of layers", fix)


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(float(value))
    except OverflowError:
        return False
