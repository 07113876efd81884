"""A layer's forward and backward pass in one call each: what ``turnout.run.sort`` else does piece by piece.

What a group of experts makes is taken up by the next piece while it is in the nearest caches, and no interpreter comes
between them, so that groups may be small.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.broad_tile import COLUMNS
from turnout.run.compiled.broads import broad_all, laid, outer_all, pair_all, suits_broads, words_room
from turnout.run.compiled.dots import dot_all, rows_at_once, suits_dots
from turnout.run.compiled.engine import array, kernel, threads
from turnout.run.compiled.fetch import LINE, fetch
from turnout.run.compiled.gates import GATES, activate_rows, slope_rows, suits_gates
from turnout.run.compiled.lanes import prange
from turnout.run.compiled.sums import add_all, columns, suits_sums
from turnout.run.plan import Plan
from turnout.run.tuned import tuning
from turnout.types import ExpertWeights, Routing
from turnout.types.weights import GATED

__all__ = ["backward_pass", "forward_pass", "suits_passes"]

# How many rows ahead of the one that is copied the next is fetched.
_AHEAD = 2
# In 16 bits what is one call is ahead of pieces by torch up to so many times the rows of products alone (a Zen 4).
_FURTHER = 2
# An expert with so many times the rows for which products are turnout's own still has them made so, beside others.
_MOST = 2


def suits_passes(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> bool:
    """Whether both passes can be one call each here and now, and are the fastest.

    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> suits_passes(torch.ones(1, 3), routing, ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 2, 3)))
    False

    Source: none; plain bookkeeping.
    """
    own = tuning().own_rows(x_TD.dtype) * (_FURTHER if x_TD.dtype.itemsize == 2 else 1)
    if not own or weights.up_bias_EH is not None or weights.down_bias_ED is not None:
        return False
    loads = [b - a for a, b in itertools.pairwise(routing.bounds()) if a < b]
    if not loads or sum(loads) > own * len(loads) or max(loads) > _MOST * own:
        return False
    up_EDH, down_EFD = weights.up_EDH, weights.down_EFD
    if not (suits_gates(weights.activation, x_TD) and suits_sums(x_TD)):
        return False
    forth = [(x_TD.new_empty(1, one.shape[1]), one) for one in (up_EDH, down_EFD)]
    back = [(x_TD.new_empty(1, one.shape[2]), one.transpose(1, 2)) for one in (up_EDH, down_EFD)]
    return all(suits_dots(*pair) for pair in forth) and all(suits_broads(*pair) for pair in back)


class _Layer(NamedTuple):
    """What both passes read."""

    x_TD: np.ndarray
    token_R: np.ndarray
    weight_R: np.ndarray
    up: np.ndarray
    down: np.ndarray
    expert_G: np.ndarray
    bound_G: np.ndarray
    part_S: np.ndarray  # where each group's experts begin
    gated: bool
    interleaved: bool
    gate: tuple[Any, ...]
    line: int
    columns: int


def _layer(plan: Plan, x_TD: Tensor, weight_R: Tensor, up_EDH: Tensor, down_EFD: Tensor) -> _Layer:
    return _Layer(
        array(x_TD.contiguous()),
        array(plan.token_P),
        array(weight_R.detach().float().contiguous()),
        array(up_EDH.transpose(1, 2)).reshape(-1),
        array(down_EFD.transpose(1, 2)).reshape(-1),
        np.array([expert for group in plan.groups for expert in group.experts]),
        np.array([plan.groups[0].bound[0], *(end for group in plan.groups for end in group.bound[1:])]),
        np.cumsum([0, *(len(group.experts) for group in plan.groups)]),
        plan.activation in GATED,
        plan.interleaved,
        tuple(GATES[plan.activation]),
        LINE // x_TD.element_size(),
        columns(x_TD.shape[1]),
    )


def forward_pass(
    plan: Plan, x_TD: Tensor, weight_R: Tensor, up_EDH: Tensor, down_EFD: Tensor, h_RH: Tensor, sum_TD: Tensor
) -> None:
    """Adds each token's weighted sum of its experts' outputs, in fp32.

    Args:
        plan: of rows that are the entries themselves.
        x_TD: the tokens.
        weight_R: the weight of each entry.
        up_EDH: the experts, as ``suits_passes`` asks.
        down_EFD: likewise.
        h_RH: receives the up products of all entries; with fewer rows than those it is room for the largest group's.
        sum_TD: (T, D) fp32, contiguous.

    Source: Gale et al., 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts".
    """
    D, F, most = up_EDH.shape[1], plan.hidden, plan.most
    rooms = (array(x_TD.new_empty(most, width)) for width in (D, F, D))
    some = tuple(rows_at_once(width * x_TD.element_size()) for width in (D, F))
    keep = h_RH.shape[0] == plan.rows
    _forward(_layer(plan, x_TD, weight_R, up_EDH, down_EFD), some, keep, array(h_RH), *rooms, array(sum_TD))


def backward_pass(
    plan: Plan,
    x_TD: Tensor,
    weight_R: Tensor,
    up_EDH: Tensor,
    down_EFD: Tensor,
    h_RH: Tensor,
    grad_TD: Tensor,
    *,
    sum_TD: Tensor | None,
    up: Tensor | None,
    down: Tensor | None,
    of_weight_R: Tensor | None,
) -> None:
    """The gradients of ``forward_pass``, of what is not None.

    Args:
        plan: as there.
        x_TD: as there.
        weight_R: as there.
        up_EDH: as there.
        down_EFD: as there.
        h_RH: the up products of all entries.
        grad_TD: gradient of the sums, in x's dtype, contiguous.
        sum_TD: (T, D) fp32, contiguous, to which the gradient of x is added.
        up: receives that of ``up_EDH``, in the same layout; experts without entries are left as they are.
        down: likewise.
        of_weight_R: (R,) fp32, receives that of the weights.

    Source: Guo et al., 2025, "SonicMoE", for the gradient of the weights.
    """
    (D, H), F, most = up_EDH.shape[1:], plan.hidden, plan.most
    layer, parts = _layer(plan, x_TD, weight_R, up_EDH, down_EFD), threads()
    g_ND, x_ND, dx_ND, da_NF, a_NF, dh_NH = (array(x_TD.new_empty(most, n)) for n in (D, D, D, F, F, H))
    pairs = x_TD.element_size() == 2
    # In 16 bits the first factor of an outer product is laid out in pairs of rows, for each expert anew.
    lefts = g_ND.reshape(-1), dh_NH.reshape(-1)
    if pairs:
        lefts = (words_room(x_TD, (most // 2 + int(np.diff(layer.part_S).max())) * max(D, H)),) * 2
    words = laid(max(int(np.diff(layer.bound_G).max()), D, H), x_TD)
    rooms = g_ND, x_ND, dx_ND, da_NF, a_NF, dh_NH, lefts, words_room(x_TD, parts * words * COLUMNS)
    grads = (x_TD.new_empty(0) if one is None else one.transpose(1, 2) for one in (up, down))
    none = x_TD.new_empty(0, D, dtype=torch.float32)
    wanted = (
        array(none if sum_TD is None else sum_TD),
        *(array(one).reshape(-1) for one in grads),
        array(none.view(-1) if of_weight_R is None else of_weight_R),
    )
    _backward(layer, array(grad_TD), array(h_RH), 1 + pairs, parts, words, rooms, wanted)


@kernel(exact=True)
def _copy(row_D, into_D):
    for d in range(row_D.shape[0]):
        into_D[d] = row_D[d]


@kernel(threaded=True, exact=True)
def _gather(x_TD, token_R, first, last, line, into_ND):
    width = x_TD.shape[1]
    for r in prange(first, last):
        ahead = token_R[min(r + _AHEAD, last - 1)] * width
        for d in range(0, width, line):
            fetch(x_TD, ahead + d)
        _copy(x_TD[token_R[r]], into_ND[r - first])


@kernel()
def _forward(layer, some, keep, h_RH, x_ND, a_NF, y_ND, sum_TD):
    D, H, F = x_ND.shape[1], h_RH.shape[1], a_NF.shape[1]
    no_place = layer.token_R[:0]
    for s in range(layer.part_S.shape[0] - 1):
        first, last = layer.part_S[s], layer.part_S[s + 1]
        experts, bound = layer.expert_G[first:last], layer.bound_G[first : last + 1] - layer.bound_G[first]
        start, count = layer.bound_G[first], bound[-1]
        end = start + count
        _gather(layer.x_TD, layer.token_R, start, end, layer.line, x_ND)
        h, a, y = h_RH[start:end] if keep else h_RH[:count], a_NF[:count], y_ND[:count]
        dot_all(x_ND.reshape(-1), layer.up, experts, bound, h.reshape(-1), D, H, some[0], layer.line)
        activate_rows(h, a, layer.gated, layer.interleaved, *layer.gate)
        dot_all(a.reshape(-1), layer.down, experts, bound, y.reshape(-1), F, D, some[1], layer.line)
        add_all(y, layer.token_R[start:end], no_place, layer.weight_R[start:end], sum_TD, 0, layer.columns)


@kernel()
def _backward(layer, grad_TD, h_RH, many, parts, words, rooms, wanted):
    g_ND, x_ND, dx_ND, da_NF, a_NF, dh_NH, lefts, room = rooms
    sum_TD, up, down, of_R = wanted
    D, H, F, line = x_ND.shape[1], h_RH.shape[1], a_NF.shape[1], layer.line
    g, x, dx, da, a, dh = (g_ND.reshape(-1), x_ND.reshape(-1), dx_ND.reshape(-1), da_NF.reshape(-1), a_NF.reshape(-1),
                           dh_NH.reshape(-1))  # fmt: skip
    for s in range(layer.part_S.shape[0] - 1):
        first, last = layer.part_S[s], layer.part_S[s + 1]
        experts, bound = layer.expert_G[first:last], layer.bound_G[first : last + 1] - layer.bound_G[first]
        start, count = layer.bound_G[first], bound[-1]
        end = start + count
        token, weight, of = layer.token_R[start:end], layer.weight_R[start:end], of_R[start : min(end, of_R.shape[0])]
        _gather(grad_TD, layer.token_R, start, end, line, g_ND)
        broad_all(g, layer.down, experts, bound, da, D, F, many, line, room, parts)
        given = h_RH[start:end], da_NF[:count], weight, a_NF[:count], dh_NH[:count], of
        slope_rows(*given, layer.gated, layer.interleaved, *layer.gate)
        if down.shape[0]:
            if many == 2:
                pair_all(g, bound, D, lefts[0])
            outer_all(lefts[0], a, experts, bound, down, D, F, many, line, room, parts, words)
        if up.shape[0]:
            _gather(layer.x_TD, layer.token_R, start, end, line, x_ND)
            if many == 2:
                pair_all(dh, bound, H, lefts[1])
            outer_all(lefts[1], x, experts, bound, up, H, D, many, line, room, parts, words)
        if sum_TD.shape[0]:
            broad_all(dh, layer.up, experts, bound, dx, H, D, many, line, room, parts)
            add_all(dx_ND[:count], token, token[:0], weight[:0], sum_TD, 0, layer.columns)
