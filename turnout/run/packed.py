"""Maps and experts in few bits: read as they lie for few rows, for many written out a little at a time, or as a whole.

Of many rows a number is written out as ``Packed.dequantised`` does it: value times scale, rounded once to x's dtype,
which is what libraries that write out whole matrices compute with.
"""

import torch
from torch import Tensor

from turnout.errors import ShapeError, word
from turnout.run.choose import execute
from turnout.run.compiled import rows_times, suits_rows
from turnout.run.compiled.engine import takes
from turnout.run.compiled.experts import experts_times, suits_experts
from turnout.run.compiled.panels import panel_products, suits_panels
from turnout.run.invariant import invariant_packed
from turnout.run.invariant_linear import invariant_packed_linear
from turnout.run.product import linear
from turnout.run.reference import reference
from turnout.run.slots import Slots
from turnout.run.sort import sort_packed, sort_slots
from turnout.run.tiled import suits_tiles
from turnout.run.tuned import tuning
from turnout.types import Packed, PackedWeights, Routing
from turnout.types.invariant import invariant_here

__all__ = ["packed_experts", "packed_linear", "packed_reference"]

# The most weights of a bank that are written out at once: what is there only for a moment stays small.
_ONCE = 1 << 22


def packed_linear(x: Tensor, weight: Packed, bias_O: Tensor | None = None) -> Tensor:
    """The affine map x W^T + b of a matrix in few bits, in x's dtype; gradients go to x and the bias alone.

    Args:
        x: (..., I).
        weight: (O, I).
        bias_O: (O,) or None.

    Returns:
        (..., O).

    Raises:
        ShapeError: x does not fit.

    >>> weight = Packed.of(torch.tensor([[1, -2], [3, 0]]), torch.tensor([[1.0], [0.5]]), group=2, bits=4)
    >>> packed_linear(torch.tensor([[1.0, 1.0]]), weight)
    tensor([[-1.0000,  1.5000]])

    Source: Dettmers et al., 2022, "LLM.int8()"; here weights alone are in few bits.
    """
    if x.shape[-1] != weight.shape[-1]:
        allowed, fix = f"have the {weight.shape[-1]} inputs of the map last", "pass what the map was made for"
        where = "turnout.run.packed_linear"
        raise ShapeError(word("x", got=f"shape {tuple(x.shape)}", allowed=allowed, where=where, fix=fix))
    if invariant_here("turnout.run.packed_linear"):
        return invariant_packed_linear(x, weight, bias_O)
    x_MI = x.reshape(-1, x.shape[-1])
    if torch.compiler.is_compiling():
        return _written_out(x, weight, bias_O)
    panels = not _wanted(x, bias_O) and suits_panels(x_MI, weight)
    few = not panels or len(x_MI) <= tuning().code_rows(x.dtype, panels=True)
    if few and suits_rows(x_MI, weight, bias_O):
        return rows_times(x_MI, weight, bias_O).view(*x.shape[:-1], weight.shape[0])
    if panels:
        return _by_panels(x_MI, weight, bias_O).view(*x.shape[:-1], weight.shape[0])
    return _written_out(x, weight, bias_O)


def _written_out(x: Tensor, weight: Packed, bias_O: Tensor | None) -> Tensor:
    return linear(x, weight.dequantised(x.dtype), None if bias_O is None else bias_O.to(x.dtype))


def _by_panels(x_MI: Tensor, weight: Packed, bias_O: Tensor | None) -> Tensor:
    out_MO = x_MI.new_empty(x_MI.shape[0], weight.shape[0])
    panel_products(x_MI, weight, [0], [0, x_MI.shape[0]], out_MO)
    return out_MO if bias_O is None else out_MO.add_(bias_O)


def _wanted(*tensors: Tensor | None) -> bool:
    """Whether gradients are asked for."""
    return torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors)


def packed_reference(x_TD: Tensor, routing: Routing, weights: PackedWeights) -> Tensor:
    """(T, D) what ``reference`` makes of the experts written out: what ``packed_experts`` must equal.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes.
        weights: the experts.

    >>> up = Packed.of(torch.ones(1, 2, 2, dtype=torch.int8), torch.ones(1, 2, 1), group=2, bits=8)
    >>> routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=1)
    >>> packed_reference(torch.ones(1, 2), routing, PackedWeights(up, up, activation="relu"))
    tensor([[4., 4.]])

    Source: none; the definition, written out.
    """
    return reference(x_TD, routing, weights.written_out(x_TD.dtype))


def packed_experts(
    x_TD: Tensor, routing: Routing, weights: PackedWeights, *, backend: str = "auto", slots: Slots | None = None
) -> Tensor:
    """(T, D), each token's weighted sum of its experts' outputs, as ``execute``; weights have no gradients.

    Only experts that some token takes are written out, as many at a time as stay small beside the model.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts.
        backend: what runs those that are written out: an executor's name, or "auto".
        slots: where experts come into slots; the weights are its ``like`` then.

    Raises:
        ShapeError: the three do not fit each other.

    >>> up = Packed.of(torch.ones(2, 2, 2, dtype=torch.int8), torch.ones(2, 2, 1), group=2, bits=8)
    >>> routing = Routing.from_topk(torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=2)
    >>> packed_experts(torch.ones(1, 2), routing, PackedWeights(up, up, activation="relu"))
    tensor([[4., 4.]])

    Source: none; our own.
    """
    _check(x_TD, routing, weights)
    if invariant_here("turnout.run.packed_experts"):
        return invariant_packed(x_TD, routing, weights)
    written_out = weights.written_out if slots is None else slots.written_out
    if x_TD.device.type == "meta" or torch.compiler.is_compiling():
        return execute(x_TD, routing, written_out(x_TD.dtype), backend=backend)
    if backend == "auto" and (found := _as_they_lie(x_TD, routing, weights, slots)) is not None:
        return found
    used_N = routing.load_E.nonzero().flatten()
    if not len(used_N):
        return torch.zeros_like(x_TD)
    each = max(1, _ONCE // (weights.up[0].code.numel() * (8 // weights.up.bits)))
    if len(used_N) == weights.num_experts <= each:
        return execute(x_TD, routing, written_out(x_TD.dtype), backend=backend)
    y_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))
    for some_N in used_N.split(each):
        place_E = torch.full_like(routing.load_E, -1).index_copy(
            0, some_N, torch.arange(len(some_N), device=x_TD.device)
        )
        held = routing.keep(place_E[routing.expert_R] >= 0).relabel(place_E.clamp_min(0), len(some_N))
        y_TD = y_TD + execute(x_TD, held, written_out(x_TD.dtype, some_N), backend=backend)
    return y_TD.to(x_TD.dtype)


def _check(x_TD: Tensor, routing: Routing, weights: PackedWeights) -> None:
    """As ``execute`` checks: kernels believe the sizes that they are told."""
    E, D, F = weights.num_experts, weights.width, weights.hidden
    shapes = tuple(x_TD.shape), weights.up.shape, weights.down.shape
    if shapes != ((routing.num_tokens, D), (E, F * (2 if weights.gated else 1), D), (E, D, F)) or (
        routing.num_experts != E
    ):
        got = f"{shapes[0]}, {routing.num_tokens} tokens x {routing.num_experts} experts, up {shapes[1]} and down"
        allowed = "agree in T, D, E and F, with H = 2F for a gated activation and F otherwise"
        fix, where = "take the routing from a router of this width and number of experts", "turnout.run.packed_experts"
        what = "x_TD, routing and weights"
        raise ShapeError(word(what, got=f"{got} {shapes[2]}", allowed=allowed, where=where, fix=fix))


def _as_they_lie(x_TD: Tensor, routing: Routing, weights: PackedWeights, slots: Slots | None) -> Tensor | None:
    """The layer's output where experts need not be written out as a whole; None where they must."""
    given = (x_TD, routing.weight_R, weights.up_bias_EH, weights.down_bias_ED)
    if not routing.num_entries or _wanted(*given):
        return None
    stacks = weights.up, weights.down, weights.up_bias_EH, weights.down_bias_ED
    panels = suits_tiles(x_TD, weights, 0) and takes(routing.weight_R, *stacks[2:])
    most = tuning().code_rows(x_TD.dtype, panels=panels) * routing.num_experts
    if routing.num_entries <= most and suits_experts(x_TD, routing, *stacks):
        return experts_times(x_TD, routing, *stacks, activation=weights.activation, slots=slots)
    if not panels:
        return None
    return sort_packed(x_TD, routing, weights) if slots is None else sort_slots(x_TD, routing, slots)
