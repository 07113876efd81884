"""The configuration of a language model: frozen, checked when it is made, and JSON there and back."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from typing import Any, Literal, Self

from turnout.errors import nearest
from turnout.fields import build, plain
from turnout.models.part_configs import FactoredConfig, MLAConfig, MoEConfig, QuantizedConfig, positive, refuse
from turnout.types.weights import Activation

__all__ = ["FactoredConfig", "LMConfig", "MLAConfig", "MoEConfig", "QuantizedConfig"]

_NAMES = {
    "qk_norm": ("none", "head", "full"),
    "attention": ("gqa", "mla"),
    "norm": ("rms", "rms_plus_one", "layer"),
    "norm_place": ("before", "after", "both"),
}
_ROPE_NEEDS = {
    "linear": ("factor",),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "longrope": ("attention_factor", "original_max_position_embeddings"),
}


@dataclasses.dataclass(frozen=True)
class LMConfig:
    """A decoder language model.

    Args:
        vocab_size: V, how many tokens there are.
        width: D, of the vector that stands for a token.
        layers: L, how many there are.
        heads: H, query heads.
        kv_heads: key and value heads, a divisor of ``heads``; None for as many.
        head_dim: width of a head, even; None for width / heads. Not used by "mla".
        hidden: F of the dense feed-forward layers; None for 8/3 of the width, rounded up to a multiple of 8.
        max_seq: the longest sequence.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are stretched, in the words of transformers' ``rope_parameters``
            (``{"rope_type": "llama3", "factor": 8.0, ...}``): linear, llama3 or yarn; or longrope, whose frequencies
            are others in batches of longer texts; None leaves them.
        rope_share: how much of each head is rotated, from its start; above 0, at most 1. Not used by "mla".
        rope_layers: the layers whose heads are rotated; in the others attention knows no order but what it may look at.
            "all" with "mla".
        local_rope_theta: another base in the layers with a window, where nothing is stretched; None for the same as in
            all others.
        learned_positions: whether each position has a vector that is added to its token's.
        norm: of layers, heads and the end: "rms"; "rms_plus_one", which stores its weight less one and multiplies
            before it rounds (Gemma); or "layer", with a bias (GPT-2). Latents have "rms".
        norm_eps: of these norms.
        norm_place: where a layer has a norm: "before" attention and feed-forward, x + f(norm(x)); "after" them,
            x + norm(f(x)) (OLMo 2); or "both" (Gemma 2).
        tie_embeddings: whether the output layer is the embedding.
        qk_norm: a norm on queries and keys: "none", over each "head" (Qwen3), or over the "full" width (OLMoE).
        attention: "gqa", or "mla" with ``mla`` set.
        mla: the sizes of latent attention.
        qkv_bias: whether the products that make queries, keys and values add a bias.
        out_bias: whether the product after attention adds one.
        sinks: whether each head has a learned score that takes part in its softmax and stands for no position, so that
            it may look nowhere. Not with "mla".
        ff_bias: whether the dense feed-forward layers add biases.
        window: each token sees this many positions, itself included; None for all earlier ones.
        window_layers: the layers that ``window`` holds in.
        activation: of the dense feed-forward layers.
        embedding_scale: what embeddings are multiplied with.
        embedding_rounded: whether that number is first rounded to the dtype of the weights.
        attention_scale: what products of queries and keys are multiplied with; None for head_width^-1/2.
        attention_softcap: c, for scores s of queries and keys that enter the softmax as c tanh(s / c); None for s. Not
            with sinks.
        residual_scale: what attention and feed-forward are multiplied with before they are added.
        logit_divisor: what logits are divided by.
        logit_softcap: c, for logits l that come out as c tanh(l / c), divided before; None for l.
        moe: the routed layers; None for a dense model.
        quantized: which maps are held in few bits; None for none. Such a model is not trained.
        init_std: standard deviation of the starting weights.

    Raises:
        UsageError: sizes that do not fit each other, with the nearest that do.

    >>> config = LMConfig(vocab_size=256, width=64, layers=2, heads=4, kv_heads=2)
    >>> config.head_width, config.dense_hidden, LMConfig.from_json_dict(config.to_json_dict()) == config
    (16, 176, True)

    Source: Touvron et al., 2023, "LLaMA", and its descendants; each field is one that a published model varies.
    """

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int | None = None
    head_dim: int | None = None
    hidden: int | None = None
    max_seq: int = 1024
    rope_theta: float = 1e4
    rope_scaling: Mapping[str, object] | None = None
    rope_share: float = 1.0
    rope_layers: Literal["all"] | tuple[int, ...] = "all"
    local_rope_theta: float | None = None
    learned_positions: bool = False
    norm: Literal["rms", "rms_plus_one", "layer"] = "rms"
    norm_eps: float = 1e-5
    norm_place: Literal["before", "after", "both"] = "before"
    tie_embeddings: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    attention: Literal["gqa", "mla"] = "gqa"
    mla: MLAConfig | None = None
    qkv_bias: bool = False
    out_bias: bool = False
    sinks: bool = False
    ff_bias: bool = False
    window: int | None = None
    window_layers: Literal["all"] | tuple[int, ...] = "all"
    activation: Activation = "swiglu"
    embedding_scale: float = 1.0
    embedding_rounded: bool = False
    attention_scale: float | None = None
    attention_softcap: float | None = None
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    logit_softcap: float | None = None
    moe: MoEConfig | None = None
    quantized: QuantizedConfig | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "max_seq"):
            positive(name, getattr(self, name), "LMConfig")
        for name in ("kv_heads", "head_dim", "hidden", "window"):
            if getattr(self, name) is not None:
                positive(name, getattr(self, name), "LMConfig")
        for name in ("rope_theta", "norm_eps", "init_std", "logit_divisor"):
            if not getattr(self, name) > 0:
                refuse(name, getattr(self, name), "be positive", "LMConfig", f"{name}={_DEFAULTS[name]}")
        for name in ("local_rope_theta", "attention_softcap", "logit_softcap"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                refuse(name, getattr(self, name), "be positive, or None", "LMConfig", f"{name}=None")
        if self.sinks and self.attention_softcap is not None:
            refuse("attention_softcap", self.attention_softcap, "be None with sinks", "LMConfig", "sinks=False")
        for name, allowed in _NAMES.items():
            if getattr(self, name) not in allowed:
                raise nearest(str(getattr(self, name)), allowed, kind=name, where="LMConfig")
        _check_heads(self)
        _check_rope(self.rope_scaling, self.rotated_width // 2)
        _check_layers("window_layers", self.window_layers, self.layers)
        _check_layers("rope_layers", self.rope_layers, self.layers)
        if self.moe is not None:
            _check_layers("moe.layers", self.moe.layers, self.layers)
            _check_each_layer(self.moe, self.layers if self.moe.layers == "all" else len(self.moe.layers))
        _check_quantized(self)

    @property
    def head_width(self) -> int:
        """``head_dim``, worked out where it is None; of queries and keys."""
        if self.mla is not None:
            return self.mla.nope_dim + self.mla.rope_dim
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def key_heads(self) -> int:
        """``kv_heads``, worked out where it is None."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def dense_hidden(self) -> int:
        """``hidden``, worked out where it is None."""
        return -(-8 * self.width // 3 // 8) * 8 if self.hidden is None else self.hidden

    @property
    def rotated_width(self) -> int:
        """How many of a head's positions RoPE turns."""
        return int(self.head_width * self.rope_share) if self.mla is None else self.mla.rope_dim

    def is_routed(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has experts."""
        return self.moe is not None and (self.moe.layers == "all" or layer in self.moe.layers)

    def experts_of(self, layer: int) -> int:
        """How many experts the router of this layer chooses among; 0 for a dense layer."""
        if self.moe is None or not self.is_routed(layer):
            return 0
        if self.moe.per_layer is None:
            return self.moe.num_experts
        return self.moe.per_layer[sum(self.is_routed(before) for before in range(layer))]

    def experts_held(self, layer: int) -> int | None:
        """How many different experts this routed layer holds; None for as many as its router chooses among."""
        if self.moe is None or self.moe.distinct is None or not self.is_routed(layer):
            return None
        return self.moe.distinct[sum(self.is_routed(before) for before in range(layer))]

    def packs(self, part: str) -> dict[str, Any] | None:
        """What ``turnout.paths.PackedWeight`` takes for maps of this kind; None where they are not quantized."""
        return None if self.quantized is None or part not in self.quantized.parts else self.quantized.sizes()

    def map_inputs(self) -> dict[str, dict[str, int]]:
        """The inputs of each map that may be quantized, by what the map makes, of each kind of maps."""
        wide, mla, moe = self.width, self.mla, self.moe
        found = {"attention": {"queries, keys and values": wide, "the output": self.heads * self.head_width}}
        if mla is not None:
            found["attention"] = {"latents": wide, "keys and values": mla.kv_rank, "the output": self.heads * mla.v_dim}
            found["attention"] |= {"queries": mla.q_rank or wide}
        if any(not self.is_routed(layer) for layer in range(self.layers)):
            found["dense"] = {"up": wide, "down": self.dense_hidden}
        if moe is not None and moe.factored is None:
            found["experts"] = {"up": wide, "down": moe.hidden}
        if moe is not None and moe.shared_hidden is not None:
            found["shared"] = {"up": wide, "down": moe.shared_hidden}
        if not self.tie_embeddings:
            found["head"] = {"logits": wide}
        return found

    def factors(self, layer: int) -> dict[str, int] | None:
        """The sizes that ``turnout.paths.FactoredBank`` takes for this routed layer; None for whole matrices."""
        if self.moe is None or self.moe.factored is None or not self.is_routed(layer):
            return None
        sizes, place = self.moe.factored, sum(self.is_routed(before) for before in range(layer))
        up_rows, down_rows = (0, 0) if sizes.rows is None else sizes.rows[place]
        ranks = {"up_rank": sizes.up_rank, "down_rank": sizes.down_rank}
        return {**ranks, "share": sizes.share, "up_rows": up_rows, "down_rows": down_rows}

    def is_turned(self, layer: int) -> bool:
        """Whether RoPE turns the heads of this layer, counted from 0."""
        return self.rope_layers == "all" or layer in self.rope_layers

    def rope_of(self, layer: int) -> tuple[float, Mapping[str, object] | None]:
        """The base of this layer's rotary frequencies, and how they are stretched."""
        if self.local_rope_theta is None or self.window_of(layer) is None:
            return self.rope_theta, self.rope_scaling
        return self.local_rope_theta, None

    def window_of(self, layer: int) -> int | None:
        """How many positions a token of this layer sees; None for all."""
        return self.window if self.window_layers == "all" or layer in self.window_layers else None

    def to_json_dict(self) -> dict[str, object]:
        """The configuration as plain JSON values."""
        return plain(self)

    @classmethod
    def from_json_dict(cls, body: Mapping[str, object]) -> Self:
        """The configuration that ``to_json_dict`` gave.

        Raises:
            TurnoutError: not a configuration; the message names the field.
        """
        return build(cls, body, "the model's configuration")


_DEFAULTS = {field.name: field.default for field in dataclasses.fields(LMConfig)}


def _near_divisor(of: int, near: int) -> int:
    """The divisor of ``of`` that is closest to ``near``."""
    pairs = ((n, of // n) for n in range(1, math.isqrt(of) + 1) if of % n == 0)
    return min(sorted(n for pair in pairs for n in pair), key=lambda n: abs(n - near))


def _check_heads(config: LMConfig) -> None:
    if (config.attention == "mla") != (config.mla is not None):
        fix = "mla=MLAConfig(...) with attention='mla', or neither"
        refuse("mla", config.mla, f"fit attention={config.attention!r}", "LMConfig", fix)
    if config.mla is not None:
        if config.qk_norm != "none" or config.key_heads != config.heads:
            got = f"qk_norm={config.qk_norm!r}, kv_heads={config.kv_heads}"
            refuse("qk_norm and kv_heads", got, "be 'none' and None with latent attention", "LMConfig",
                    "qk_norm='none', kv_heads=None")  # fmt: skip
        if config.sinks:
            refuse("sinks", True, "be False with latent attention", "LMConfig", "sinks=False")
        if config.rope_layers != "all":
            refuse("rope_layers", config.rope_layers, "be 'all' with latent attention", "LMConfig", "rope_layers='all'")
        return
    if config.head_dim is None and config.width % config.heads:
        near = _near_divisor(config.width, config.heads)
        refuse("heads", config.heads, f"divide width={config.width} unless head_dim is set", "LMConfig",
                f"heads={near}")  # fmt: skip
    if config.heads % config.key_heads:
        near = _near_divisor(config.heads, config.key_heads)
        refuse("kv_heads", config.kv_heads, f"divide heads={config.heads}", "LMConfig", f"kv_heads={near}")
    if config.rope_layers == ():  # nothing turns
        return
    if config.head_width % 2:
        refuse("head_dim", config.head_width, "be even, for the rotary embedding", "LMConfig",
                f"head_dim={config.head_width + 1}")  # fmt: skip
    if not 0 < config.rope_share <= 1 or config.rotated_width < 2 or config.rotated_width % 2:
        got, allowed = config.rope_share, f"be an even part of a head, of head_dim={config.head_width}"
        refuse(
            "rope_share", got, allowed, "LMConfig", f"rope_share={2 / config.head_width:g} or a multiple of it, to 1"
        )


def _check_rope(scaling: Mapping[str, object] | None, pairs: int) -> None:
    if scaling is None:
        return
    kind = scaling.get("rope_type")
    if kind not in _ROPE_NEEDS:
        raise nearest(str(kind), _ROPE_NEEDS, kind="rope_type", where="LMConfig.rope_scaling")
    missing = [name for name in _ROPE_NEEDS[kind] if not isinstance(scaling.get(name), int | float)]
    if missing:
        refuse("rope_scaling", dict(scaling), f"give {', '.join(missing)}, a number", "LMConfig", f"{missing[0]} in it")
    wrong = [name for name in _ROPE_NEEDS[kind] if not 0 < float(typing.cast(float, scaling[name])) < math.inf]
    if wrong:
        refuse("rope_scaling", dict(scaling), f"have {', '.join(wrong)} above 0", "LMConfig", f"{wrong[0]}=1.0 or more")
    for name in ("short_factor", "long_factor") if kind == "longrope" else ():
        factors = scaling.get(name)
        if not isinstance(factors, list | tuple) or len(factors) != pairs or not all(map(_is_positive, factors)):
            allowed = f"be a number above 0 for each of the {pairs} pairs of positions that are rotated"
            refuse(f"rope_scaling.{name}", factors, allowed, "LMConfig", f"{name}=[1.0] * {pairs}")
    if kind == "llama3" and not scaling["low_freq_factor"] < scaling["high_freq_factor"]:  # pyrefly: ignore
        allowed = "have low_freq_factor below high_freq_factor"
        refuse("rope_scaling", dict(scaling), allowed, "LMConfig", "low_freq_factor=1.0, high_freq_factor=4.0")


def _is_positive(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _check_layers(name: str, layers: Literal["all"] | tuple[int, ...], count: int) -> None:
    if layers == "all":
        return
    wrong = [layer for layer in layers if not isinstance(layer, int) or not 0 <= layer < count]
    if isinstance(layers, str) or wrong or len(set(layers)) < len(layers):
        refuse(name, layers, f"be 'all' or different layers from 0 to {count - 1}", "LMConfig", f"{name}='all'")


def _check_each_layer(moe: MoEConfig, routed: int) -> None:
    held = moe.distinct
    if held is not None and not (
        len(held) == routed and all(isinstance(n, int) and 1 <= n <= moe.num_experts for n in held)
    ):
        allowed = f"give each of the {routed} routed layers 1 to num_experts={moe.num_experts} experts, or be None"
        refuse("moe.distinct", held, allowed, "LMConfig", "distinct=None")
    if moe.per_layer is not None and len(moe.per_layer) != routed:
        refuse("moe.per_layer", moe.per_layer, f"give each of the {routed} routed layers its experts, or be None",
                "LMConfig", "per_layer=None")  # fmt: skip
    rows = None if moe.factored is None else moe.factored.rows
    if rows is not None and len(rows) != routed:
        refuse("moe.factored.rows", rows, f"have one pair for each of the {routed} routed layers, or be None",
                "LMConfig", "rows=None")  # fmt: skip


def _check_quantized(config: LMConfig) -> None:
    """Refuses groups that do not divide the inputs of a map, or bits that do not fill its bytes."""
    held = config.quantized
    if held is None:
        return
    of = config.map_inputs()
    missing = [part for part in held.parts if part not in of]
    if missing:
        why = {"head": "the output layer is the embedding, which stays as it is", "experts": "none with whole matrices"}
        got = f"{missing[0]!r}: {why.get(missing[0], 'there are none')}"
        refuse("quantized.parts", got, f"be of {', '.join(of)}", "LMConfig", f"parts={tuple(of)}")
    inputs = {f"{name} of {part}": size for part in held.parts for name, size in of[part].items()}
    step = math.gcd(*inputs.values())
    for name, size in inputs.items():
        if held.group is not None and size % held.group:
            near = max(n for n in range(1, held.group + 1) if step % n == 0)
            allowed = f"divide the {size} inputs of the maps that make {name}"
            refuse("quantized.group", held.group, allowed, "LMConfig", f"group={near}, or None for one scale a row")
        if held.bits == 4 and size % 2:
            got, allowed = f"4 with {size} inputs of the maps that make {name}", "be 8 where inputs are odd"
            refuse("quantized.bits", got, allowed, "LMConfig", "bits=8")
