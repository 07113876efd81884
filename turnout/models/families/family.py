"""What a transformers architecture is to us: its keys in config.json, its tensor names, both ways."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from turnout.errors import CheckpointError, word
from turnout.models.config import LMConfig, MoEConfig
from turnout.models.families.meaning import router_meaning
from turnout.types.weights import Activation

if TYPE_CHECKING:
    from turnout.models.lm import LM

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "relu": "reglu",
}
# The two kinds of layers, in layer_types.
WINDOWED, WHOLE = "sliding_attention", "full_attention"


@dataclasses.dataclass(frozen=True)
class Names:
    """How an architecture names the tensors of its layers, below ``model.layers.N.``: those that differ."""

    routed: str = "mlp"
    router: str = "gate.weight"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str = "shared_expert"
    # One tensor for all experts, gate and up together, and one for all down; None where each expert has its own.
    fused: tuple[str, str] | None = None
    # Whether those are (E, in, out), with gates and values that alternate.
    alternating: bool = False
    # What names begin with, but for the output layer's.
    root: str = "model."
    # All tensors by name, of a model and the root, where they are not named as Llama's are.
    views: "Callable[[LM, str], dict[str, Tensor]] | None" = None
    # One tensor for queries, keys and values, one for gates and values of a dense layer; None where each has its own.
    qkv: str | None = None
    gate_up: str | None = None

    @property
    def in_memory(self) -> "Names":
        """The names that transformers 5 has in memory, and writes when told not to convert them."""
        return dataclasses.replace(self, routed="mlp", fused=("experts.gate_up_proj", "experts.down_proj"))


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture.

    Args:
        model_type: of config.json.
        architecture: the class in transformers.
        routed: whether it has experts.
        defaults: what transformers takes for a key that config.json leaves out.
        read: from the keys of config.json to our configuration.
        write: the keys for a configuration; what the architecture has no key for is lost, and ``express`` notices.
        layouts: the names of its tensors: as folders have them, and as transformers 5 has them in memory.
        limits: further reasons why a configuration cannot be of this architecture.
        unpacks: the quantisations that are read beside fp8, and whose bytes a model may hold and write again.
        aliases: second name of a key -> the key. Where config.json holds both, transformers takes the second name's.
        also_called: other model types whose code is this architecture's, line by line.
        silent: the configuration with parts that add nothing, which the architecture cannot be without; None where
            there are none to add. Their weights are all zero.
        exact_gate: whether its router computes in fp32 whatever the weights are stored in.
    """

    model_type: str
    architecture: str
    routed: bool
    defaults: Mapping[str, object]
    read: Callable[["Keys"], LMConfig]
    write: Callable[[LMConfig], dict[str, object]]
    layouts: tuple[Names, Names] = (Names(), Names().in_memory)
    limits: Callable[[LMConfig], list[str]] = lambda config: []
    unpacks: tuple[str, ...] = ()
    aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)
    also_called: tuple[str, ...] = ()
    silent: Callable[[LMConfig], LMConfig | None] = lambda config: None
    exact_gate: bool = False

    def keys(self, given: Mapping[str, Any]) -> "Keys":
        """The keys of a config.json as transformers reads them in this architecture."""
        second = {key: given[alias] for alias, key in self.aliases.items() if alias in given}
        return Keys({**given, **second}, self.defaults, self.aliases)


class Keys:
    """The keys of a config.json, with the architecture's defaults behind them; a second name is that of its key."""

    def __init__(
        self, given: Mapping[str, Any], defaults: Mapping[str, object], aliases: Mapping[str, str] | None = None
    ) -> None:
        self._given, self._defaults, self._aliases = given, defaults, aliases or {}

    def get(self, name: str, default: object = None) -> Any:
        """The value of a key; where it is missing the architecture's default, else ``default``."""
        name = self._aliases.get(name, name)
        return self._given.get(name, self._defaults.get(name, default))

    def __getitem__(self, name: str) -> Any:
        value = self.get(name)
        if value is None:
            raise refusal(f"the key {name!r}", "nothing", "be given", f"add {name!r} to config.json")
        return value

    def filled(self, name: str) -> Any:
        """The value of a key; null is as if it were missing."""
        name = self._aliases.get(name, name)
        return self._defaults.get(name) if self._given.get(name) is None else self._given[name]

    def but(self, **changed: object) -> "Keys":
        """The same with other values for these keys."""
        return Keys({**self._given, **changed}, self._defaults)

    def number(self, name: str, default: float) -> float:
        """A number; where the key is missing the architecture's default, else ``default``. Null is none."""
        value = self.get(name, default)
        if value is None:
            fix = f"write {name!r} in config.json, or remove the key, which then counts as {default:g}"
            raise refusal(f"the key {name!r}", "null", "be a number", fix)
        return float(value)

    def fixed(self, **wanted: object) -> None:
        """Refuses keys that ask for what our model does not do."""
        for name, value in wanted.items():
            got = self.get(name, value)
            if got not in (value, None) or (got is None and value is True):  # null is no more than false
                fix = "convert the model with transformers first, or leave this part out of it"
                raise refusal(f"the key {name!r}", repr(got), f"be {value!r}", fix)


def refusal(what: str, got: str, allowed: str, fix: str) -> CheckpointError:
    """The error for a config.json that cannot be read."""
    return CheckpointError(word(what, got=got, allowed=allowed, where="config.json", fix=fix))


def read_backbone(keys: Keys, *, activation: str = "hidden_act") -> dict[str, Any]:
    """The fields of LMConfig that nearly all architectures have; ``activation`` is the key that names theirs."""
    keys.fixed(is_causal=True)  # transformers lets every token see all others where it is false
    theta, scaling, share = read_rope(keys)
    heads = keys["num_attention_heads"]
    return {
        "vocab_size": keys["vocab_size"],
        "width": keys["hidden_size"],
        "layers": keys["num_hidden_layers"],
        "heads": heads,
        "kv_heads": keys.get("num_key_value_heads") or heads,
        "head_dim": keys.get("head_dim"),
        "hidden": keys["intermediate_size"],
        "max_seq": keys["max_position_embeddings"],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "rope_share": share,
        "norm_eps": keys["rms_norm_eps"],
        "tie_embeddings": bool(keys.get("tie_word_embeddings", False)),
        "activation": read_activation(keys, activation),
        "init_std": float(keys.get("initializer_range") or 0.02),
    }


def write_backbone(config: LMConfig) -> dict[str, object]:
    """The keys of ``read_backbone``; the RoPE in both the old and the new spelling."""
    scaling = dict(config.rope_scaling) if config.rope_scaling else None
    keys: dict[str, object] = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_heads,
        "intermediate_size": config.dense_hidden,
        "max_position_embeddings": config.max_seq,
        # transformers 5 reads rope_parameters, 4 the two others; either alone would be a silent default elsewhere.
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": config.rope_theta},
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "hidden_act": write_activation(config.activation),
        "initializer_range": config.init_std,
        "attention_dropout": 0.0,
    }
    if config.mla is None and config.head_width * config.heads != config.width:
        keys["head_dim"] = config.head_width
    return keys


def read_rope(keys: Keys) -> tuple[float, dict[str, object] | None, float]:
    """Theta, how the frequencies are stretched, and how much of a head turns."""
    given = keys.get("rope_scaling") or keys.filled("rope_parameters") or {}
    return read_scaling(keys, given, keys.get("rope_theta") or 1e4)


def read_scaling(keys: Keys, given: Mapping[str, Any], theta: float) -> tuple[float, dict[str, object] | None, float]:
    """What ``read_rope`` gives, of one dictionary of rotary parameters; ``theta`` is the base if it has none."""
    given = dict(given)
    theta = given.pop("rope_theta", None) or theta
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    share = float(given.pop("partial_rotary_factor", None) or keys.get("partial_rotary_factor") or 1.0)
    if kind == "default":
        return float(theta), None, share
    if kind not in ("linear", "llama3", "yarn"):
        allowed = "be 'default', 'linear', 'llama3' or 'yarn'"
        raise refusal("rope_type", repr(kind), allowed, "use a model whose frequencies do not change with the length")
    if kind != "linear":
        _read_before(keys, given)
    if "truncate" in given:  # null is no in transformers, not its default
        given["truncate"] = bool(given["truncate"])
    stretched = {"rope_type": kind, **{name: value for name, value in given.items() if value is not None}}
    return float(theta), stretched, share


def _read_before(keys: Keys, given: dict[str, Any]) -> None:
    """Adds the length before the stretching, where the scaling does not say it itself."""
    name = "original_max_position_embeddings"
    said, inside = keys.get(name), given.get(name)
    if said is not None and inside not in (None, said):
        allowed = f"be what the scaling says, {inside!r}: transformers 5 takes the first, transformers 4 the second"
        fix = "keep the one of the two that the model was trained with"
        raise refusal(f"the key {name!r}", repr(said), allowed, fix)
    given[name] = inside or said or keys["max_position_embeddings"]


def read_activation(keys: Keys, key: str = "hidden_act", known: Mapping[str, Activation] = _ACTIVATIONS) -> Activation:
    """The activation that a key names; gated, unless others are ``known``."""
    name = keys.get(key, "silu")
    if name not in known:
        raise refusal(key, repr(name), f"be one of {', '.join(known)}", "nothing: it is the model's own")
    return known[name]


def write_activation(activation: Activation) -> str:
    """Its name in transformers; "silu" where it has none, which ``express`` notices."""
    return {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}.get(activation, "silu")


def moe_of(config: LMConfig) -> MoEConfig:
    """The routed layers; stand-ins for a dense model, which ``express`` refuses before anything is written."""
    return config.moe or MoEConfig(num_experts=1, top_k=1, hidden=1)


def softmax_router(keys: Keys, *, renormalize: bool, top_k: int, num_experts: int) -> dict[str, Any]:
    """Softmax over all experts, then the k largest."""
    if top_k == 1 and renormalize and num_experts > 1:
        allowed = "be at least 2 where weights are renormalised: with one expert every weight is 1"
        raise refusal("num_experts_per_tok", "1", allowed, "set norm_topk_prob to false, or num_experts_per_tok to 2")
    return {"router": "TopK", "router_options": {"renormalize": renormalize and num_experts > 1}}


def renormalizes(config: LMConfig) -> bool:
    """Whether a TopK router's weights sum to 1."""
    return bool(router_meaning(moe_of(config))[1].get("renormalize"))


def read_window(keys: Keys, is_windowed: Callable[[int], bool]) -> dict[str, Any]:
    """A window that some layers have, where ``use_sliding_window`` says so."""
    window = keys.get("sliding_window") if keys.get("use_sliding_window", False) else None
    if not window:
        return {}
    count = keys["num_hidden_layers"]
    kinds = keys.get("layer_types") or [WINDOWED if is_windowed(layer) else "" for layer in range(count)]
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == WINDOWED)
    return {"window": window, "window_layers": layers} if layers else {}


def write_window(config: LMConfig) -> dict[str, object]:
    """The keys of ``read_window``."""
    kinds = [WHOLE if config.window_of(n) is None else WINDOWED for n in range(config.layers)]
    return {
        "use_sliding_window": config.window is not None,
        "sliding_window": config.window,
        "max_window_layers": config.layers,
        "layer_types": kinds,
    }


def read_kinds(keys: Keys, is_windowed: Callable[[int], bool]) -> dict[str, Any]:
    """The window of the layers that ``layer_types`` says, else ``is_windowed``."""
    count = keys["num_hidden_layers"]
    kinds = keys.get("layer_types") or [WINDOWED if is_windowed(layer) else WHOLE for layer in range(count)]
    if len(kinds) != count or not set(kinds) <= {WINDOWED, WHOLE}:
        allowed = f"name {WINDOWED!r} or {WHOLE!r} for each of the {count} layers"
        raise refusal("the key 'layer_types'", repr(kinds), allowed, "restore config.json from a copy")
    layers = tuple(layer for layer, kind in enumerate(kinds) if kind == WINDOWED)
    return {"window": keys["sliding_window"], "window_layers": layers} if layers else {}


def write_kinds(config: LMConfig, window: int) -> dict[str, object]:
    """The keys of ``read_kinds``: transformers wants a window even where no layer has it."""
    return {"sliding_window": config.window or window, "layer_types": write_window(config)["layer_types"]}


def read_routed_layers(keys: Keys) -> tuple[int, ...]:
    """The routed layers of a Qwen model."""
    step, dense = int(keys.number("decoder_sparse_step", 1)), keys.get("mlp_only_layers") or []
    return tuple(n for n in range(keys["num_hidden_layers"]) if n not in dense and (n + 1) % step == 0)


def write_routed_layers(config: LMConfig) -> dict[str, object]:
    """The keys of ``read_routed_layers``."""
    return {"decoder_sparse_step": 1, "mlp_only_layers": [n for n in range(config.layers) if not config.is_routed(n)]}
