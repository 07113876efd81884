"""The architectures of llama.cpp that compute what ours do, and what of a model each of them has no words for."""

import dataclasses
import math
from collections.abc import Callable

from turnout.errors import UsageError, word
from turnout.models.config import LMConfig
from turnout.models.families import FAMILIES
from turnout.models.families.express import architecture_of, obstacles
from turnout.models.families.family import Family, moe_of, renormalizes
from turnout.models.families.meaning import router_meaning
from turnout.models.rope import attention_scale

__all__ = ["ARCHITECTURES", "Architecture", "architecture_for", "whole_window"]

# Layers of the two Gemmas whose queries llama.cpp scales by width / heads, not by the heads' width.
_GEMMA_27B = {"gemma2": 46, "gemma3": 62}
# As many layers have the DeepSeeks that make queries without a latent; llama.cpp knows them by that alone.
_LITE = (26, 27)
# What transformers and ours have for the norms of latents, where llama.cpp takes the model's.
_LATENT_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp.

    Args:
        name: ``general.architecture``.
        neighbours: whether it turns neighbours 2i and 2i + 1 of a head, not halves apart.
        biases: the products that may add biases: "qkv", "out" and "ff".
        ropes: how its frequencies may be stretched.
        activation: of its feed-forward layers and experts.
        ff_norm: the name of the norm before the feed-forward layer.
        windows: whether some layers may have a window.
        limits: what else keeps a model from being one, each with the reason.
    """

    name: str
    neighbours: bool = False
    biases: tuple[str, ...] = ("qkv",)
    ropes: tuple[str, ...] = ("linear", "yarn")
    activation: str = "swiglu"
    ff_norm: str = "ffn_norm"
    windows: bool = False
    limits: Callable[[LMConfig], list[str]] = lambda config: []


def architecture_for(config: LMConfig, *, prefer: str | None = None) -> tuple[Architecture, LMConfig]:
    """The one that computes what a model does, and the configuration as it has it: perhaps with parts that add nothing.

    Args:
        config: of the model.
        prefer: the model_type of transformers to choose where several fit.

    Raises:
        UsageError: llama.cpp has none that does what this model does; every reason is named.
    """
    first, written = architecture_of(config, prefer=prefer)
    others = [family for family in FAMILIES if family is not first and not obstacles(config, family)]
    refused = None
    for family, whole in ((first, written), *((family, config) for family in others)):
        try:
            return _of(whole, family), whole
        except UsageError as error:
            refused = refused or error
    assert refused is not None
    raise refused


def _of(config: LMConfig, family: Family) -> Architecture:
    found = ARCHITECTURES.get(family.model_type)
    fix = "write a folder of transformers (--as transformers)"
    if found is None:
        known = ", ".join(sorted(ARCHITECTURES))
        got, allowed = family.architecture, f"be of one of {known}, which are compared with llama.cpp"
        raise UsageError(word("the architecture", got=got, allowed=allowed, where="GGUF", fix=fix))
    reasons = _obstacles(config, found) + found.limits(config)
    if reasons:
        got, allowed = "; ".join(reasons), f"be what llama.cpp's {found.name} computes"
        raise UsageError(word("the model", got=got, allowed=allowed, where="GGUF", fix=fix))
    return found


def whole_window(config: LMConfig, layer: int) -> bool:
    """Whether a layer sees everything: without a window, or one that no text is longer than."""
    window = config.window_of(layer)
    return window is None or window >= config.max_seq


def _obstacles(config: LMConfig, its: Architecture) -> list[str]:
    found = []
    scaling = config.rope_scaling or {}
    kind = scaling.get("rope_type")
    if kind is not None and kind not in its.ropes:
        found.append(f"rotary frequencies are stretched as {kind}, there only as {', '.join(its.ropes)}")
    if kind == "yarn" and (why := _yarn(config)):
        found.append(why)
    for name, has in (("qkv", config.qkv_bias), ("out", config.out_bias), ("ff", config.ff_bias)):
        if has and name not in its.biases:
            found.append(f"{name}_bias is true")
    if not its.windows and not all(whole_window(config, layer) for layer in range(config.layers)):
        found.append(f"layers see {config.window} tokens of {config.max_seq}, there they see all")
    used = {config.activation} if config.moe is None or config.moe.layers != "all" else set()
    used |= {config.moe.activation} if config.moe is not None else set()
    if used != {its.activation}:
        found.append(f"the activation is {', '.join(sorted(used))}, there it is {its.activation}")
    free = its.name in ("granite", "granitemoe", "gemma2", "gemma3", "deepseek2")
    if not free and not math.isclose(attention_scale(config), config.head_width**-0.5, rel_tol=1e-6):
        found.append(f"attention_scale is {attention_scale(config):g}, there it is {config.head_width**-0.5:g}")
    return found


def _yarn(config: LMConfig) -> str | None:
    """What of YaRN llama.cpp has no words for; borders of the ramp that are not rounded are told apart (notes)."""
    from turnout.models.rope import Rope

    magnitude, factor = Rope(config).magnitude, float((config.rope_scaling or {})["factor"])  # pyrefly: ignore
    wanted = 1.0 if config.mla is not None else 0.1 * math.log(factor) + 1.0
    if not math.isclose(magnitude, wanted, rel_tol=1e-6):
        return f"YaRN multiplies by {magnitude:g}, there by {wanted:g}"
    return None


def _renormalized(config: LMConfig, wanted: bool) -> list[str]:
    name, _ = router_meaning(moe_of(config))
    if name != "TopK":
        return [f"the router is {name}, there it is TopK"]
    if renormalizes(config) != wanted:
        return [f"weights of the chosen experts {'do not sum' if wanted else 'sum'} to 1"]
    return []


def _always(config: LMConfig) -> list[str]:
    routed = [] if all(config.is_routed(n) for n in range(config.layers)) else ["some layers have no experts"]
    return routed + _renormalized(config, True)


def _never(config: LMConfig) -> list[str]:
    routed = [] if all(config.is_routed(n) for n in range(config.layers)) else ["some layers have no experts"]
    return routed + _renormalized(config, False)


def _gemma(config: LMConfig) -> list[str]:
    found = []
    if not math.isclose(config.embedding_scale, config.width**0.5, rel_tol=1e-6):
        found.append(f"embeddings are multiplied by {config.embedding_scale:g}, there by {config.width**0.5:g}")
    return found + ([] if config.tie_embeddings else ["the output layer is not the embedding"])


def _gemma2(config: LMConfig) -> list[str]:
    kinds = [config.window_of(n) is not None for n in range(config.layers)]
    alternate = [n % 2 == 0 for n in range(config.layers)]
    found = [] if kinds == alternate else ["windows are not in every other layer, from the first"]
    found += [] if config.attention_softcap and config.logit_softcap else ["scores or logits are not capped"]
    return found + _gemma(config) + _gemma_scale(config, "gemma2")


def _gemma3(config: LMConfig) -> list[str]:
    kinds = [config.window_of(n) is not None for n in range(config.layers)]
    sixth = [(n + 1) % 6 != 0 for n in range(config.layers)]
    found = [] if kinds == sixth else ["windows are not in all but every sixth layer"]
    capped = [name for name in ("attention_softcap", "logit_softcap") if getattr(config, name) is not None]
    found += [f"{name} is set" for name in capped]
    return found + _gemma(config) + _gemma_scale(config, "gemma3")


def _gemma_scale(config: LMConfig, name: str) -> list[str]:
    large = config.layers == _GEMMA_27B[name]
    wanted = (config.width / config.heads if large else config.head_width) ** -0.5
    if math.isclose(attention_scale(config), wanted, rel_tol=1e-6):
        return []
    return [f"attention_scale is {attention_scale(config):g}, there it is {wanted:g}"]


def _smollm3(config: LMConfig) -> list[str]:
    fourth = [bool((n + 1) % 4) for n in range(config.layers)]
    turned = [config.is_turned(n) for n in range(config.layers)]
    return [] if turned == fourth else ["RoPE is not left out in every fourth layer, and only there"]


def _gpt_oss(config: LMConfig) -> list[str]:
    kinds = [config.window_of(n) is not None for n in range(config.layers)]
    found = [] if kinds == [n % 2 == 0 for n in range(config.layers)] else ["windows are not in every other layer"]
    biased = config.qkv_bias and config.out_bias
    return found + ([] if biased else ["attention has no biases"]) + _always(config)


def _dense_first(config: LMConfig) -> list[str]:
    routed = [config.is_routed(n) for n in range(config.layers)]
    moe = moe_of(config)
    found = [] if sorted(routed) == routed else ["a layer with experts comes before one without"]
    if moe.shared_hidden is not None and moe.shared_hidden % moe.hidden:
        found.append(f"the shared expert's {moe.shared_hidden} is no multiple of {moe.hidden}")
    name = router_meaning(moe)[0]
    if name not in ("GroupLimited", "TopK"):
        found.append(f"the router is {name}")
    return found


def _olmoe(config: LMConfig) -> list[str]:
    found = [] if config.key_heads == config.heads else [f"{config.key_heads} key heads for {config.heads} heads"]
    return found + _never(config)


def _glm4(config: LMConfig) -> list[str]:
    name, options = router_meaning(moe_of(config))
    sigmoid = name == "GroupLimited" and options.get("scores") == "sigmoid" and options.get("bias")
    return _dense_first(config) + ([] if sigmoid else ["the router is no sigmoid with corrections"])


def _deepseek(config: LMConfig) -> list[str]:
    found = _dense_first(config)
    if not math.isclose(config.norm_eps, _LATENT_EPS, rel_tol=1e-6):
        found.append(f"norm_eps is {config.norm_eps:g} and that of latents {_LATENT_EPS:g}, there they are the same")
    lite = config.mla is not None and config.mla.q_rank is None
    if lite != (config.layers in _LITE):
        found.append(f"queries are made {'without' if lite else 'from'} a latent in {config.layers} layers")
    options = router_meaning(moe_of(config))[1]
    if options.get("num_groups", 1) > 1 and options.get("group_score", "top2") != "top2":
        found.append("groups of experts are scored by their best one, there by their best two")
    return found


def _phi3(config: LMConfig) -> list[str]:
    square = config.head_width * config.heads == config.width
    return [] if square else [f"heads are {config.head_width} wide, there {config.width / config.heads:g}"]


_ALL, _PLAIN = ("qkv", "out", "ff"), ("linear", "yarn")
_LLAMA = Architecture("llama", True, _ALL, (*_PLAIN, "llama3"))
ARCHITECTURES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": dataclasses.replace(_LLAMA, biases=(), limits=_always),
    "qwen2": Architecture("qwen2"),
    "qwen2_moe": Architecture("qwen2moe", limits=_never),
    "qwen3": Architecture("qwen3"),
    "qwen3_moe": Architecture("qwen3moe", limits=_always),
    "olmo2": Architecture("olmo2", biases=()),
    "olmoe": Architecture("olmoe", biases=(), limits=_olmoe),
    "gemma": Architecture("gemma", biases=(), activation="geglu_tanh", limits=_gemma),
    "gemma2": Architecture("gemma2", biases=(), activation="geglu_tanh", windows=True, limits=_gemma2),
    "gemma3_text": Architecture("gemma3", biases=(), activation="geglu_tanh", windows=True, limits=_gemma3),
    "gpt2": Architecture("gpt2", biases=_ALL, ropes=(), activation="gelu_tanh"),
    "phi3": Architecture("phi3", biases=(), ropes=("longrope",), limits=_phi3),
    "smollm3": Architecture("smollm3", True, limits=_smollm3),
    "granite": Architecture("granite", True, _ALL, (*_PLAIN, "llama3")),
    "granitemoe": Architecture("granitemoe", True, ("qkv", "out"), (*_PLAIN, "llama3"), limits=_always),
    "gpt_oss": Architecture(
        "gpt-oss", False, ("qkv", "out"), _PLAIN, "swiglu_oai", "post_attention_norm", True, _gpt_oss
    ),
    "glm4_moe": Architecture("glm4moe", ff_norm="post_attention_norm", limits=_glm4),
    "deepseek_v2": Architecture("deepseek2", True, (), limits=_deepseek),
    "deepseek_v3": Architecture("deepseek2", True, (), limits=_deepseek),
}
