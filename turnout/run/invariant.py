"""Batch-invariant experts: a token's bits do not depend on who shares the batch, as in ``invariant_linear``."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from turnout.run.compiled.dots import suits_dots
from turnout.run.compiled.experts import experts_times, few_rows, suits_experts, suits_few_rows
from turnout.run.compiled.gates import GATES, suits_gates
from turnout.run.compiled.passes import forward_pass
from turnout.run.compiled.sums import suits_sums
from turnout.run.invariant_linear import HALVES
from turnout.run.plan import plan_rows
from turnout.run.reference import activate, prepare
from turnout.run.sort import sort_packed
from turnout.run.tiled import suits_tiles
from turnout.solve.fixed_rows import LINE, ROWS, fixed_rows, fixed_tiles
from turnout.types import ExpertWeights, PackedWeights, Routing

__all__ = ["invariant_experts", "invariant_packed"]

# Rows of tiles whose intermediate results are in memory at once.
_ROOM = 512


def invariant_experts(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """(T, D) each token's weighted sum of its experts' outputs, a token's bits the same in any batch; no gradients.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts.

    Raises:
        ShapeError: the three do not fit each other.
        UsageError: their dtypes differ.

    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> invariant_experts(torch.ones(1, 3), routing, weights)
    tensor([[6., 6., 6.]])

    Source: Gale et al., 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", the dropless form.
    """
    x_TD, weights = prepare(x_TD, routing, weights)
    if not routing.num_entries:
        return torch.zeros_like(x_TD)
    if not _one_call(x_TD, weights):
        if x_TD.dtype in HALVES and suits_few_rows(x_TD, routing, weights):
            return few_rows(x_TD, routing, weights)
        return _summed(_rows(x_TD, routing, weights), routing, x_TD.dtype)
    plan = plan_rows(routing, weights, x_TD, one_call=True)
    h_NH = x_TD.new_empty(plan.most, weights.up_EDH.shape[2])
    sum_TD = x_TD.new_zeros(x_TD.shape, dtype=torch.float32)
    forward_pass(plan, x_TD, routing.weight_R, weights.up_EDH, weights.down_EFD, h_NH, sum_TD)
    return sum_TD.to(x_TD.dtype)


def _one_call(x_TD: Tensor, weights: ExpertWeights) -> bool:
    """Whether the whole layer is kernels whose rows do not know each other; asks for nothing about the batch."""
    if weights.up_bias_EH is not None or weights.down_bias_ED is not None:
        return False
    pairs = [(x_TD.new_empty(1, stack.shape[1]), stack) for stack in (weights.up_EDH, weights.down_EFD)]
    return suits_gates(weights.activation, x_TD) and suits_sums(x_TD) and all(suits_dots(*pair) for pair in pairs)


def _rows(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """(R, D) what each entry's expert makes of its token: an expert's rows in tiles that agree, some at a time."""
    out_RD, suits = x_TD.new_empty(routing.num_entries, x_TD.shape[1]), _agreed(weights.up_EDH, weights.down_EFD)
    some, room = list[_Tile](), 0
    for expert, (begin, end) in enumerate(itertools.pairwise(routing.bounds())):
        for first, last, size in fixed_tiles(end - begin, suits) if end > begin else ():
            some.append(_Tile(expert, begin + first, begin + last, slice(room, room + size)))
            room += -(-size // ROWS) * ROWS
            if room >= _ROOM:
                _write(out_RD, x_TD, routing, weights, some, room)
                some, room = [], 0
    if some:
        _write(out_RD, x_TD, routing, weights, some, room)
    return out_RD


class _Tile(NamedTuple):
    """Entries first to last, of one expert, and which rows of the room are theirs and what fills the tile."""

    expert: int
    first: int
    last: int
    rows: slice


def _write(
    out_RD: Tensor, x_TD: Tensor, routing: Routing, weights: ExpertWeights, some: list[_Tile], room: int
) -> None:
    """The outputs of these tiles, which follow each other: each by itself but for what is done to single numbers."""
    count_N = torch.tensor([tile.last - tile.first for tile in some])
    start_N = torch.tensor([tile.rows.start for tile in some])
    place_R = torch.arange(int(count_N.sum())) + (start_N - count_N.cumsum(0) + count_N).repeat_interleave(count_N)
    entries = slice(some[0].first, some[-1].last)
    row_PD = x_TD.new_zeros(room, x_TD.shape[1]).index_copy_(0, place_R, x_TD.index_select(0, routing.token_R[entries]))
    made_PH, made_PD = (x_TD.new_zeros(room, stack.shape[2]) for stack in (weights.up_EDH, weights.down_EFD))
    for tile in some:
        torch.mm(row_PD[tile.rows], weights.up_EDH[tile.expert], out=made_PH[tile.rows])
        if weights.up_bias_EH is not None:
            made_PH[tile.rows] += weights.up_bias_EH[tile.expert]
    made_PF = activate(made_PH, weights.activation, interleaved=weights.interleaved)
    for tile in some:
        torch.mm(made_PF[tile.rows], weights.down_EFD[tile.expert], out=made_PD[tile.rows])
        if weights.down_bias_ED is not None:
            made_PD[tile.rows] += weights.down_bias_ED[tile.expert]
    out_RD[entries] = made_PD.index_select(0, place_R)


def _agreed(*stacks: Tensor) -> Callable[[int], bool]:
    """Whether tiles of so many rows agree for every expert: those whose matrices begin at all places in a line."""
    matrices = []
    for stack in stacks:
        step = stack.stride(0) * stack.element_size()
        matrices += [stack[expert].t() for expert in range(min(len(stack), LINE // math.gcd(LINE, step)))]
    return functools.cache(lambda size: all(fixed_rows(matrix, size) for matrix in matrices))


def _summed(row_RD: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """(T, D) each token's weighted sum, its entries one after the other: a product, a sum, each rounded by itself."""
    wide = torch.promote_types(dtype, torch.float32)
    order_R, start_T = routing.by_token
    count_T, y_TD = start_T.diff(), row_RD.new_zeros(routing.num_tokens, row_RD.shape[1], dtype=wide)
    for place in range(int(count_T.max())):
        token_N = (count_T > place).nonzero().flatten()
        entry_N = order_R[start_T[token_N] + place]
        y_TD[token_N] += row_RD[entry_N].to(wide) * routing.weight_R[entry_N, None].to(wide)
    return y_TD.to(dtype)


def invariant_packed(x_TD: Tensor, routing: Routing, weights: PackedWeights) -> Tensor:
    """``invariant_experts`` of experts in few bits, as they lie where kernels take them, else written out.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts.

    >>> from turnout.types import Packed
    >>> up = Packed.of(torch.ones(2, 2, 2, dtype=torch.int8), torch.ones(2, 2, 1), group=2, bits=8)
    >>> routing = Routing.from_topk(torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=2)
    >>> invariant_packed(torch.ones(1, 2), routing, PackedWeights(up, up, activation="relu"))
    tensor([[4., 4.]])

    Source: as ``invariant_experts``.
    """
    if not routing.num_entries:
        return torch.zeros_like(x_TD)
    stacks = weights.up, weights.down, weights.up_bias_EH, weights.down_bias_ED
    if suits_tiles(x_TD, weights, 0) and weights.activation in GATES and suits_sums(x_TD):
        return sort_packed(x_TD, routing, weights)
    if suits_experts(x_TD, routing, *stacks):
        return experts_times(x_TD, routing, *stacks, activation=weights.activation)
    return invariant_experts(x_TD, routing, weights.written_out(x_TD.dtype))
