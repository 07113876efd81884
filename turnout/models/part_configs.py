"""The configurations of the parts of a language model: its experts and its latent attention."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Self

import torch

from turnout.decide import token
from turnout.errors import UsageError, nearest, word
from turnout.types.weights import Activation

__all__ = ["FactoredConfig", "MLAConfig", "MoEConfig", "QuantizedConfig", "positive", "refuse"]

# The kinds of maps that may be held in few bits; the output layer only where it is asked for.
MAPS = ("experts", "shared", "dense", "attention", "head")
CODES = ("int", "float", "nf4", "quantile", "mxfp4")
# Of "mxfp4": the inputs that share a scale, and the dtype that holds every power of two there is.
_MX = {"bits": 4, "group": 32, "scale": "bfloat16"}

# Routers: those of single layers, and the one that routes all layers at once.
_ROUTERS = (*token.__all__, "PreGate")

# No tensor of a model has a side of 2^31; what is worked out from sizes below it ends.
_SIZES = 1 << 31


@dataclasses.dataclass(frozen=True)
class FactoredConfig:
    """The sizes of experts whose matrices are W = L R + S: a product of two thin ones, and a few rows.

    Args:
        up_rank: of every gate and value matrix, 0 for S alone.
        down_rank: of every down matrix, 0 for S alone.
        share: how many neighbouring experts share the factor beside the width.
        rows: for each routed layer, in layer order, how many rows of S its up and its down matrices have in all; None
            for none.

    >>> FactoredConfig(up_rank=4, down_rank=4, share=8).rows is None
    True

    Source: none; plain configuration of ``turnout.paths.FactoredBank``.
    """

    up_rank: int
    down_rank: int
    share: int = 1
    rows: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        for name in ("up_rank", "down_rank"):
            if getattr(self, name) != 0:
                positive(name, getattr(self, name), "FactoredConfig")
        positive("share", self.share, "FactoredConfig")
        wrong = [pair for pair in self.rows or () if len(pair) != 2 or min(pair) < 0]
        if wrong:
            refuse("rows", wrong[0], "be two whole numbers of at least 0 a layer", "FactoredConfig", "rows=None")


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """The routed feed-forward layers of a language model.

    Args:
        num_experts: E, of each routed layer.
        top_k: K, experts per token, 1 to E.
        hidden: F, of each routed expert.
        router: the name of a class in ``turnout.decide.token``; or "PreGate", which routes all layers at once from the
            token ids (``turnout.models.PreGate``).
        router_options: further keywords of that class (``{"renormalize": True}``).
        shared_hidden: F of the expert that is always on; None for none.
        shared_gate: whether the shared expert is scaled by a learned sigmoid.
        layers: which layers are routed, counted from 0; all the others are dense.
        activation: of routed and shared experts.
        bias: whether both products of routed and shared experts add a bias.
        distinct: how many different experts each routed layer holds, in layer order, where several of the router's E
            share their weights (merged experts); None for E.
        factored: the sizes of experts whose matrices are factored; None for whole ones.
        per_layer: how many experts each routed layer has, in layer order, where they are not all ``num_experts``, which
            is the most of them: a pyramid has fewer in its first layers. Not with ``distinct``, ``factored`` or
            "PreGate". No architecture of transformers has it.
        zero_computation: how many experts of each kind compute next to nothing (``{"constant": 2, "copy": 1, "zero":
            1}``, as of ``turnout.paths.ZeroComputation``); the router chooses among these after the ``num_experts``.
            None for none. Not with ``distinct``, ``factored``, ``per_layer`` or "PreGate".

    >>> MoEConfig(num_experts=8, top_k=2, hidden=64).router
    'TopK'

    Source: none; plain configuration.
    """

    num_experts: int
    top_k: int
    hidden: int
    router: str = "TopK"
    router_options: Mapping[str, object] = dataclasses.field(default_factory=dict)
    shared_hidden: int | None = None
    shared_gate: bool = False
    layers: Literal["all"] | tuple[int, ...] = "all"
    activation: Activation = "swiglu"
    bias: bool = False
    distinct: tuple[int, ...] | None = None
    factored: FactoredConfig | None = None
    per_layer: tuple[int, ...] | None = None
    zero_computation: Mapping[str, int] | None = None

    @property
    def free(self) -> int:
        """How many experts compute next to nothing."""
        return sum((self.zero_computation or {}).values())

    def fine(self, pieces: int, shared: int) -> Self:
        """The same experts cut finer: m times as many of an m-th of the size, K_s of which are always on.

        The layer holds m E - K_s routed experts of hidden F / m, of which m K - K_s run, and one shared expert of
        hidden K_s F / m: as many parameters and products as before.

        Args:
            pieces: m, a divisor of ``hidden``.
            shared: K_s, from 0 to less than m K.

        Raises:
            UsageError: pieces or shared out of range, or a layer that has a shared expert already.

        >>> cut = MoEConfig(num_experts=8, top_k=2, hidden=48).fine(4, 2)
        >>> cut.num_experts, cut.top_k, cut.hidden, cut.shared_hidden
        (30, 6, 12, 24)

        Source: Dai et al., 2024, "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language
        Models", section 3.
        """
        if (
            pieces < 1
            or self.hidden % pieces
            or not 0 <= shared < pieces * self.top_k
            or self.shared_hidden is not None
        ):
            allowed = f"divide hidden={self.hidden}, be from 0 to {pieces * self.top_k - 1}, and be the first to share"
            refuse("pieces and shared", f"{pieces} and {shared}", allowed, "MoEConfig.fine", "pieces=1 and shared=0")
        hidden = self.hidden // pieces
        sizes = {"num_experts": pieces * self.num_experts - shared, "top_k": pieces * self.top_k - shared}
        return dataclasses.replace(self, **sizes, hidden=hidden, shared_hidden=shared * hidden or None)

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden"):
            positive(name, getattr(self, name), "MoEConfig")
        if self.shared_hidden is not None:
            positive("shared_hidden", self.shared_hidden, "MoEConfig")
        if self.top_k > self.num_experts:
            refuse("top_k", self.top_k, f"be between 1 and num_experts={self.num_experts}", "MoEConfig",
                    f"top_k={self.num_experts}")  # fmt: skip
        if self.router not in _ROUTERS:
            raise nearest(self.router, _ROUTERS, kind="router", where="MoEConfig")
        if self.shared_gate and self.shared_hidden is None:
            refuse("shared_gate", True, "go with a shared expert", "MoEConfig", "shared_hidden too")
        if self.per_layer is not None:
            self._check_per_layer(self.per_layer)
        if self.zero_computation is not None:
            kinds = ("constant", "copy", "zero")
            counts = self.zero_computation.values()
            whole = all(isinstance(count, int) and not isinstance(count, bool) and count >= 0 for count in counts)
            if not set(self.zero_computation) <= set(kinds) or not whole or self.free < 1:
                refuse("zero_computation", dict(self.zero_computation), f"name whole numbers of {kinds}", "MoEConfig",
                       'zero_computation={"constant": 2, "copy": 1, "zero": 1}')  # fmt: skip
            others = (self.distinct, self.factored, self.per_layer)
            if any(other is not None for other in others) or self.router == "PreGate":
                allowed = "be None with merged or factored experts, a pyramid, and one router for all layers"
                refuse("zero_computation", dict(self.zero_computation), allowed, "MoEConfig", "zero_computation=None")

    def _check_per_layer(self, counts: tuple[int, ...]) -> None:
        for count in counts:
            positive("per_layer", count, "MoEConfig")
        least, most = min(counts, default=0), max(counts, default=0)
        if not self.top_k <= least < most == self.num_experts:
            allowed = f"be from top_k={self.top_k} to num_experts={self.num_experts}, that in one and less in another"
            refuse("per_layer", counts, allowed, "MoEConfig", f"num_experts={max(most, 2)}, or per_layer=None")
        if self.distinct is not None or self.factored is not None or self.router == "PreGate":
            allowed = "be None with merged or factored experts, and with one router for all layers"
            refuse("per_layer", counts, allowed, "MoEConfig", "per_layer=None")


@dataclasses.dataclass(frozen=True)
class MLAConfig:
    """The sizes of multi-head latent attention.

    Args:
        kv_rank: width of the latent that keys and values are made from, and that the cache holds.
        rope_dim: rotated part of each head, even; shared by all heads in the keys.
        nope_dim: part of each head that is not rotated.
        v_dim: width of each head's value.
        q_rank: width of the latent that queries are made from; None makes them straight from the input.
        interleaved: whether the rotated pairs are neighbours (2i, 2i + 1) or halves apart (i, i + rope_dim / 2).

    >>> MLAConfig(kv_rank=16, rope_dim=8, nope_dim=16, v_dim=16).q_rank is None
    True

    Source: DeepSeek-AI, 2024, "DeepSeek-V2".
    """

    kv_rank: int
    rope_dim: int
    nope_dim: int
    v_dim: int
    q_rank: int | None = None
    interleaved: bool = True

    def __post_init__(self) -> None:
        for name in ("kv_rank", "rope_dim", "nope_dim", "v_dim"):
            positive(name, getattr(self, name), "MLAConfig")
        if self.q_rank is not None:
            positive("q_rank", self.q_rank, "MLAConfig")
        if self.rope_dim % 2:
            refuse("rope_dim", self.rope_dim, "be even", "MLAConfig", f"rope_dim={self.rope_dim + 1}")


@dataclasses.dataclass(frozen=True)
class QuantizedConfig:
    """Which maps are held in few bits, and in which: see ``turnout.types.Packed``. All else stays as it is.

    Args:
        bits: 4 or 8, of each weight.
        group: how many neighbouring inputs share a scale; divides the inputs of every map. None for one scale a row.
        codes: what the codes stand for: whole numbers ("int"), or with 4 bits sixteen levels that are stored beside
            them, "float", "nf4" or "quantile"; or "mxfp4", which is read and never rounded to: the levels of gpt-oss in
            groups of 32, with scales that are powers of two.
        scale: the dtype of the scales.
        parts: the kinds of maps: of "experts" (routed), "shared" (experts that are always on), "dense" (feed-forward
            layers), "attention", and "head", an output layer that is not the embedding.

    >>> QuantizedConfig(bits=4).group
    64

    Source: none; plain configuration of ``turnout.paths.PackedLinear`` and ``PackedBank``.
    """

    bits: Literal[4, 8]
    group: int | None = 64
    codes: Literal["int", "float", "nf4", "quantile", "mxfp4"] = "int"
    scale: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    parts: tuple[str, ...] = MAPS[:-1]

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            near = 8 if isinstance(self.bits, int) and self.bits > 4 else 4
            refuse("bits", self.bits, "be 4 or 8, which fill whole bytes", "QuantizedConfig", f"bits={near}")
        if self.group is not None:
            positive("group", self.group, "QuantizedConfig")
        if self.codes not in CODES:
            raise nearest(str(self.codes), CODES, kind="codes", where="QuantizedConfig")
        for name, wanted in _MX.items() if self.codes == "mxfp4" else ():
            if (got := getattr(self, name)) != wanted:
                fix = f"{name}={wanted!r}, or other codes"
                refuse(name, got, f"be {wanted!r} with codes='mxfp4'", "QuantizedConfig", fix)
        if self.bits == 8 and self.codes != "int":
            refuse("codes", self.codes, "be 'int' with bits=8", "QuantizedConfig", "codes='int', or bits=4")
        if self.scale not in ("bfloat16", "float16", "float32"):
            raise nearest(str(self.scale), ("bfloat16", "float16", "float32"), kind="scale", where="QuantizedConfig")
        for part in self.parts:
            if part not in MAPS:
                raise nearest(str(part), MAPS, kind="part", where="QuantizedConfig")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            refuse("parts", self.parts, "name kinds of maps, each once", "QuantizedConfig", f"parts={MAPS[:-1]}")

    def sizes(self) -> dict[str, Any]:
        """What ``turnout.paths.PackedWeight`` wants to know."""
        held = {"bits": self.bits, "group": self.group, "levels": self.codes != "int"}
        return held | {"scale": getattr(torch, self.scale)}


def refuse(name: str, got: object, allowed: str, where: str, fix: str) -> None:
    """Raises the UsageError that every field of a configuration is refused with."""
    raise UsageError(word(name, got=got, allowed=allowed, where=where, fix=f"pass {fix}"))


def positive(name: str, got: object, where: str) -> None:
    """Refuses a size that is no whole number from 1 to below 2^31."""
    if not isinstance(got, int) or isinstance(got, bool) or got < 1:
        refuse(name, got, "be a whole number of at least 1", where, f"{name}=1 or more")
    if isinstance(got, int) and got >= _SIZES:
        refuse(name, got, f"be below {_SIZES:,}", where, f"a smaller {name}")
