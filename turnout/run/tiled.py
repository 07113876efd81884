"""Whether the products of a layer are turnout's own, which take rows and matrices as they lie, or torch's."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from turnout.run.compiled.broads import broads, outers, suits_broads, suits_outers
from turnout.run.compiled.dots import dots, suits_dots
from turnout.run.compiled.engine import takes
from turnout.run.compiled.panels import panel_products, suits_panels
from turnout.run.tuned import tuning
from turnout.types import ExpertWeights, Packed, PackedWeights

__all__ = ["suits_tiles", "tiled_map", "tiled_outers", "tiled_products"]

# Maps of fewer rows than that are torch's, and of longer ones, in bytes: four outputs' weights would fill a processor's
# first cache, and rows that lie a power of two apart push each other out of the second.
_LEAST, _LONGEST = 64, 1 << 12


def suits_tiles(x_TD: Tensor, weights: ExpertWeights | PackedWeights, rows: float) -> bool:
    """Whether all products of these experts, of so many rows each, are turnout's own; those in few bits of any number.

    >>> import torch
    >>> suits_tiles(torch.ones(4, 3), ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 2, 3)), 4)
    False

    Source: none; plain bookkeeping.
    """
    if isinstance(weights, PackedWeights):
        pair = weights.up, weights.down
        return all(suits_panels(x_TD.new_empty(1, stack.shape[-1]), stack) for stack in pair)
    if rows > tuning().own_rows(x_TD.dtype):
        return False
    stacks = weights.up_EDH, weights.down_EFD
    likes = [x_TD.new_empty(1, stack.shape[1]) for stack in stacks] + [
        x_TD.new_empty(1, stack.shape[2]) for stack in stacks
    ]
    pairs = [*stacks, *(stack.transpose(1, 2) for stack in stacks)]
    return all(suits_dots(like, one) or suits_broads(like, one) for like, one in zip(likes, pairs, strict=True))


def tiled_products(
    row_NI: Tensor, stack_EIO: Tensor | Packed, experts: int, out_NO: Tensor
) -> Callable[[Tensor, Any, list[int], list[int], Tensor], None] | None:
    """What multiplies the rows of each expert by its matrix, where that is turnout's own to do; None where it is not.

    It is called with rows of some experts, one expert's after the other's; the matrices of all, (E, I, O) or in few
    bits (E, O, I); which experts; where each one's rows begin and the last one's end; and what is written to.

    Args:
        row_NI: the rows.
        stack_EIO: the matrices; those in few bits are of ``suits_tiles``.
        experts: of how many experts these rows are.
        out_NO: what is to be written to.

    Source: none; plain bookkeeping.
    """
    if isinstance(stack_EIO, Packed):
        return panel_products
    if row_NI.shape[0] > experts * tuning().own_rows(row_NI.dtype) or not out_NO.is_contiguous():
        return None
    if suits_dots(row_NI, stack_EIO):
        return dots
    return broads if suits_broads(row_NI, stack_EIO) else None


def tiled_map(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor | None:
    """The affine map x W^T + b of many rows in fp32 where that is turnout's own to do; no gradients.

    Args:
        x: (..., I).
        weight_OI: (O, I).
        bias_O: (O,) or None.

    >>> tiled_map(torch.ones(4, 3), torch.ones(2, 3), None)

    Source: none; plain bookkeeping.
    """
    rows, outs = x.numel() // max(1, x.shape[-1]), weight_OI.shape[0]
    given = [x, weight_OI] if bias_O is None else [x, weight_OI, bias_O]
    if (
        x.dtype != torch.float32  # in 16 bits torch's are as fast
        or not _LEAST <= rows <= tuning().own_rows(x.dtype)
        or weight_OI.ndim != 2
        or x.shape[-1] != weight_OI.shape[1]
        or x.shape[-1] * x.element_size() > _LONGEST
        or (torch.is_grad_enabled() and any(one.requires_grad for one in given))
        or torch.is_autocast_enabled("cpu")
        or not takes(*given)
        or any(one.dtype != x.dtype for one in given)
        or (bias_O is not None and bias_O.shape != (outs,))
    ):
        return None
    x_MI, stack_1IO = x.reshape(rows, -1), weight_OI.t().unsqueeze(0)
    if not suits_dots(x_MI, stack_1IO):
        return None
    out_MO = x.new_empty(rows, outs)
    dots(x_MI, stack_1IO, [0], [0, rows], out_MO)
    return (out_MO if bias_O is None else out_MO.add_(bias_O)).view(*x.shape[:-1], outs)


def tiled_outers(left_NO: Tensor, right_NI: Tensor, expert_G: list[int], bound_G: list[int], grad_EOI: Tensor) -> bool:
    """Each expert's left^T right over its rows to its place in the gradient, likewise; whether it was done.

    Args:
        left_NO: rows of some experts, one expert's after the other's.
        right_NI: the same rows' other factor.
        expert_G: which experts.
        bound_G: where each one's rows begin and the last one's end.
        grad_EOI: of all experts.

    Source: none; plain bookkeeping.
    """
    if left_NO.shape[0] > len(expert_G) * tuning().own_rows(left_NO.dtype):
        return False
    most = max(end - begin for begin, end in itertools.pairwise(bound_G))
    if not suits_outers(left_NO, right_NI, grad_EOI, most):
        return False
    outers(left_NO, right_NI, expert_G, bound_G, grad_EOI)
    return True
