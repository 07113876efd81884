"""Paths in few bits: a linear map, a dense feed-forward layer and a bank of experts, of models that are not trained."""

from typing import Any, Self

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.run import activate, merged, packed_experts, packed_linear
from turnout.types import Cost, Packed, PackedWeights, Routing
from turnout.types.called import Called
from turnout.types.weights import GATED, Activation

__all__ = ["PackedBank", "PackedFeedForward", "PackedLinear", "PackedWeight"]


class PackedWeight(nn.Module):
    """The buffers of one matrix or stack in few bits: ``code``, ``scale`` and, with levels, ``levels``.

    All zero until ``fill`` or a state dict sets them. Their dtypes stay when a model is brought to another one.

    Args:
        shape: (O, I), or (E, O, I) of a stack.
        bits: 8 or 4.
        group: how many neighbouring inputs share a scale; None for one scale a row.
        levels: whether codes of 4 bits stand for sixteen levels, kept here too.
        scale: the dtype of the scales.

    Raises:
        UsageError: as ``turnout.types.Packed``.

    >>> weight = PackedWeight(3, 8, bits=4, group=4)
    >>> sorted(weight.state_dict()), weight.half().packed
    (['code', 'scale'], Packed(3x8, bits=4, group=4))

    Source: none; the buffers of ``turnout.types.Packed``.
    """

    code: Tensor
    scale: Tensor
    levels: Tensor | None

    def __init__(
        self,
        *shape: int,
        bits: int,
        group: int | None,
        levels: bool = False,
        scale: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__()
        *outer, inner = shape
        self.bits, self.group = bits, inner if group is None else group
        zero = Packed.of(
            torch.zeros(*outer, inner, dtype=torch.int8),
            torch.zeros(*outer, max(1, inner // max(self.group, 1)), dtype=scale),
            group=self.group,
            bits=bits,
            levels=torch.zeros(16) if levels else None,
        )
        for name in ("code", "scale", "levels"):
            self.register_buffer(name, getattr(zero, name))

    @property
    def packed(self) -> Packed:
        """The weights; the same memory."""
        return Packed(self.code, self.scale, self.group, self.bits, self.levels)

    @torch.no_grad()
    def fill(self, packed: Packed) -> Self:
        """Copies these weights in, to the bit.

        Raises:
            UsageError: they are of another shape, dtype or kind.
        """
        wanted, got = self._kind(self.packed), self._kind(packed)
        if wanted != got:
            where, fix = "turnout.paths.PackedWeight.fill", "build it with the sizes of these weights"
            raise UsageError(word("packed", got=f"{got}", allowed=f"be {wanted}", where=where, fix=fix))
        for name in ("code", "scale", "levels"):
            if (held := getattr(self, name)) is not None:
                held.copy_(getattr(packed, name))
        return self

    @staticmethod
    def _kind(packed: Packed) -> str:
        return f"{packed!r} with scales in {packed.scale.dtype}"

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """As of any module, but that no dtype changes."""
        kept = {name: buffer for name, buffer in self.named_buffers(recurse=False) if buffer is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            after = getattr(self, name)
            if after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        return self

    def numel(self) -> int:
        """How many weights there are."""
        return self.code.numel() * (8 // self.bits)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return repr(self.packed)


def _bias(there: bool, *shape: int) -> nn.Parameter | None:
    """A bias as it starts, which stays as precise as it is."""
    return nn.Parameter(torch.zeros(*shape), requires_grad=False) if there else None


class PackedLinear(Called):
    """The affine map x W^T + b with W in few bits; all zero until it is filled.

    Args:
        inner: I, of the inputs.
        outer: O, of the outputs.
        bias: whether there is a b.
        packs: further keywords of ``PackedWeight``: bits, group, levels, scale.

    >>> PackedLinear(8, 3, packs={"bits": 4, "group": 4})(torch.ones(2, 8)).shape
    torch.Size([2, 3])

    Source: Dettmers et al., 2022, "LLM.int8()"; here weights alone are in few bits.
    """

    def __init__(self, inner: int, outer: int, *, packs: dict[str, Any], bias: bool = False) -> None:
        super().__init__()
        self.weight = PackedWeight(outer, inner, **packs)
        self.bias = _bias(bias, outer)

    def forward(self, x: Tensor) -> Tensor:
        """(..., O) from (..., I)."""
        return packed_linear(x, self.weight.packed, self.bias)


class PackedFeedForward(Called):
    """The dense feed-forward layer, as ``FeedForward``, with both matrices in few bits.

    Args:
        width: D, of the tokens.
        hidden: F.
        packs: further keywords of ``PackedWeight``.
        activation: as in ``Bank``.
        bias: whether both products add a bias.

    >>> PackedFeedForward(8, 16, packs={"bits": 8, "group": None})(torch.zeros(2, 3, 8)).shape
    torch.Size([2, 3, 8])

    Source: Shazeer, 2020, "GLU Variants Improve Transformer".
    """

    def __init__(
        self, width: int, hidden: int, *, packs: dict[str, Any], activation: Activation = "swiglu", bias: bool = False
    ) -> None:
        super().__init__()
        activate(torch.empty(0, 2), activation)
        self.width, self.hidden, self.activation = width, hidden, activation
        wide = hidden * (2 if activation in GATED else 1)
        self.up, self.down = PackedWeight(wide, width, **packs), PackedWeight(width, hidden, **packs)
        self.up_bias, self.down_bias = _bias(bias, wide), _bias(bias, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) from (..., D)."""
        hidden = activate(packed_linear(x, self.up.packed, self.up_bias), self.activation)
        return packed_linear(hidden, self.down.packed, self.down_bias)

    def cost(self, tokens: int) -> Cost:
        """What a forward pass over ``tokens`` tokens takes (products only)."""
        products = self.up.numel() + self.down.numel()
        params = products + sum(parameter.numel() for parameter in self.parameters())
        return Cost(params=params, params_active=params, flops=2.0 * tokens * products)


class PackedBank(Called):
    """E feed-forward experts, as ``Bank``, with their matrices in few bits.

    Args:
        num_experts: E, at least 1.
        width: D, of the tokens.
        hidden: F, of each expert.
        packs: further keywords of ``PackedWeight``.
        activation: as in ``Bank``.
        bias: whether both products add a bias.

    >>> bank = PackedBank(4, width=8, hidden=16, packs={"bits": 4, "group": 8})
    >>> bank.up.packed, bank.down.packed
    (Packed(4x32x8, bits=4, group=8), Packed(4x8x16, bits=4, group=8))

    Source: Dettmers and Zettlemoyer, 2023, "The case for 4-bit precision: k-bit Inference Scaling Laws", for groups.
    """

    def __init__(
        self,
        num_experts: int,
        width: int,
        hidden: int,
        *,
        packs: dict[str, Any],
        activation: Activation = "swiglu",
        bias: bool = False,
    ) -> None:
        super().__init__()
        activate(torch.empty(0, 2), activation)
        self.num_experts, self.width, self.hidden, self.activation = num_experts, width, hidden, activation
        wide = hidden * (2 if activation in GATED else 1)
        self.up = PackedWeight(num_experts, wide, width, **packs)
        self.down = PackedWeight(num_experts, width, hidden, **packs)
        self.up_bias, self.down_bias = _bias(bias, num_experts, wide), _bias(bias, num_experts, width)

    def weights(self) -> PackedWeights:
        """The experts as executors see them."""
        return PackedWeights(self.up.packed, self.down.packed, self.up_bias, self.down_bias, self.activation)

    def forward(self, x_TD: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        """(T, D), each token's weighted sum of its experts' outputs.

        Args:
            x_TD: (T, D), the tokens.
            routing: which experts each takes, and with what weight.
            backend: what runs experts that are written out: an executor's name, or "auto".
        """
        return packed_experts(x_TD, routing, self.weights(), backend=backend)

    def merged(self, x_TD: Tensor, routing: Routing, sequence_T: Tensor) -> Tensor:
        """(T, D), each token through the average of the experts that its sequence takes; see ``turnout.run.merged``."""
        return merged(x_TD, routing, self.weights().written_out(x_TD.dtype), sequence_T)

    def cost(self, tokens: int, entries: float) -> Cost:
        """What a forward pass over ``tokens`` tokens with ``entries`` routed entries takes (products only)."""
        products = (self.up.numel() + self.down.numel()) // self.num_experts
        each = products + sum(parameter[0].numel() for parameter in self.parameters())
        return Cost(
            params=each * self.num_experts,
            params_active=round(each * entries / max(tokens, 1)),
            flops=2.0 * entries * products,
        )

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.num_experts}, width={self.width}, hidden={self.hidden}, activation={self.activation!r}"
