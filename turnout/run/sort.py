"""Sorted dispatch: rows gathered expert by expert, one pair of products per expert, results summed per token.

The whole bank is one autograd function. It keeps only its inputs and the up products, works through the experts in
groups whose intermediate results stay in the processor's cache, recomputes the activations going back, and writes each
expert's gradient straight to its place.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from turnout.run.pointwise import activate_into, activation_gradient
from turnout.run.reference import prepare, uncompiled
from turnout.run.workspace import room, room_like
from turnout.types import ExpertWeights, Routing

__all__ = ["sort"]

# Numbers per intermediate tensor of a group of experts: 512 KiB in fp32, which leaves several of them in cache.
_GROUP = 1 << 17
# Rows per expert are rounded up to this in 16-bit dtypes, where every new count makes oneDNN compile a new kernel.
_ROUND = 16


@uncompiled
def sort(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Each token's weighted sum of its experts' outputs, by one product per expert over rows sorted by expert.

    Kept for the backward pass besides the inputs: the up products, (R, H), and nothing that grows with E.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts.

    Returns:
        (T, D) in x's dtype; tokens without entries are zero.

    Raises:
        ShapeError: the three do not fit each other.
        UsageError: their dtypes differ and autocast is off.

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> sort(torch.ones(1, 3), routing, weights)
    tensor([[6., 6., 6.]])

    Source: Gale et al., 2022, "MegaBlocks: Efficient Sparse Training with Mixture-of-Experts", the dropless form.
    Keeping only the up product, and row products as the gradient of the combine weights: Guo et al., 2025, "SonicMoE".
    """
    dtype = x_TD.dtype
    x_TD, weights = prepare(x_TD, routing, weights, cast_weights=False)
    with torch.autocast(x_TD.device.type, enabled=False):
        plan = _plan(routing, weights, x_TD)
        tensors = (weights.up_EDH, weights.down_EFD, weights.up_bias_EH, weights.down_bias_ED)
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (x_TD, routing.weight_R, *tensors)
        ):
            return _Sort.apply(x_TD, routing.weight_R, *tensors, plan).to(dtype)
        return _forward(plan, x_TD, routing.weight_R, tensors)[0].to(dtype)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """How a routing is run: P rows, R of them entries and the rest copies that round up each expert's count."""

    activation: str
    hidden: int
    num_tokens: int
    token_P: Tensor
    # Where each entry's row is (None: row r is entry r), and all of them ordered by token, (T, K) or ragged.
    place_R: Tensor | None
    order_R: Tensor
    row_R: Tensor
    start_T: Tensor | None
    # The experts with entries as (expert, first row, last row + 1), in groups of neighbours.
    groups: list[list[tuple[int, int, int]]]

    @property
    def rows(self) -> int:
        return self.token_P.numel()

    @property
    def most(self) -> int:
        """Rows of the largest group."""
        return max(group[-1][2] - group[0][1] for group in self.groups)

    def spread(self, value_R: Tensor) -> Tensor:
        """(P,) the values of the entries, zero on the rows that only round up."""
        if self.place_R is None:
            return value_R
        return value_R.new_zeros(self.rows).index_copy_(0, self.place_R, value_R)

    def collect(self, row_PD: Tensor, weight_R: Tensor | None) -> Tensor:
        """(T, D) the sum of each token's rows, weighted by ``weight_R`` if given."""
        each = None if weight_R is None else weight_R.index_select(0, self.order_R).to(row_PD.dtype)
        if self.start_T is None:
            index = self.row_R.view(self.num_tokens, -1)
            each = None if each is None else each.view(index.shape)
            return torch.nn.functional.embedding_bag(index, row_PD, mode="sum", per_sample_weights=each)
        return torch.nn.functional.embedding_bag(
            self.row_R, row_PD, self.start_T, mode="sum", per_sample_weights=each, include_last_offset=True
        )


def _plan(routing: Routing, weights: ExpertWeights, x_TD: Tensor) -> _Plan:
    bound = routing.offset_E.tolist()
    token_P, place_R = routing.token_R, None
    few = x_TD.dtype.itemsize != 2 or x_TD.device.type != "cpu" or routing.num_tokens <= _ROUND
    if not few:
        token_P, place_R, bound = _rounded(routing)
    order_R, start_T = routing.by_token
    step = max(_GROUP // weights.hidden, 1)
    groups: list[list[tuple[int, int, int]]] = []
    for expert, (first, last) in enumerate(itertools.pairwise(bound)):
        if first == last:
            continue
        if not groups or last - groups[-1][0][1] > step:
            groups.append([])
        groups[-1].append((expert, first, last))
    return _Plan(
        activation=weights.activation,
        hidden=weights.hidden,
        num_tokens=routing.num_tokens,
        token_P=token_P,
        place_R=place_R,
        order_R=order_R,
        row_R=order_R if place_R is None else place_R.index_select(0, order_R),
        start_T=None if routing.top_k is not None else start_T,
        groups=groups,
    )


def _rounded(routing: Routing) -> tuple[Tensor, Tensor, list[int]]:
    """Tokens of the rows, rows of the entries, and bounds, with each expert's last row repeated to a round count."""
    load_E = routing.load_E
    round_E = (load_E + (_ROUND - 1)) // _ROUND * _ROUND
    end_E = round_E.cumsum(0)
    shift_E = (end_E - round_E) - routing.offset_E[:-1]
    bound = [0, *end_E.tolist()]
    expert_P = torch.repeat_interleave(
        torch.arange(load_E.numel(), device=load_E.device), round_E, output_size=bound[-1]
    )
    entry_P = torch.arange(bound[-1], device=load_E.device).sub_(shift_E.index_select(0, expert_P))
    entry_P = torch.minimum(entry_P, (routing.offset_E[1:] - 1).index_select(0, expert_P))
    place_R = torch.arange(routing.num_entries, device=load_E.device) + shift_E.index_select(0, routing.expert_R)
    return routing.token_R.index_select(0, entry_P), place_R, bound


_Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def _matrices(stack: Tensor, group: list[tuple[int, int, int]], dtype: torch.dtype) -> Iterator[Tensor]:
    """The matrices of a group's experts in the dtype of the products, each valid until the next."""
    if stack.dtype == dtype:
        yield from (stack[expert] for expert, _, _ in group)
        return
    cast = room_like(stack[:1].to(dtype))[0]
    yield from (cast.copy_(stack[expert]) for expert, _, _ in group)


def _forward(plan: _Plan, x_TD: Tensor, weight_R: Tensor, weights: _Weights, keep: bool = False):
    """The output, and the up products if they are to be kept."""
    up_EDH, down_EFD, up_bias_EH, down_bias_ED = weights
    dtype, device, (D, H) = x_TD.dtype, x_TD.device, up_EDH.shape[1:]
    if not plan.groups:
        return x_TD.new_zeros(x_TD.shape), x_TD.new_empty(0, H)
    most = plan.most
    x_ND, a_NF = room((most, D), dtype, device), room((most, plan.hidden), dtype, device)
    h_PH = room((plan.rows if keep else most, H), dtype, device)
    y_PD = room((plan.rows, D), dtype, device)
    for group in plan.groups:
        base, end = group[0][1], group[-1][2]
        x, a = x_ND[: end - base], a_NF[: end - base]
        h = h_PH[base:end] if keep else h_PH[: end - base]
        torch.index_select(x_TD, 0, plan.token_P[base:end], out=x)
        for (expert, first, last), up in zip(group, _matrices(up_EDH, group, dtype), strict=True):
            _product(x[first - base : last - base], up, up_bias_EH, expert, h[first - base : last - base])
        activate_into(h, plan.activation, a)
        for (expert, first, last), down in zip(group, _matrices(down_EFD, group, dtype), strict=True):
            _product(a[first - base : last - base], down, down_bias_ED, expert, y_PD[first:last])
    return plan.collect(y_PD, weight_R), h_PH


def _product(rows: Tensor, matrix: Tensor, bias: Tensor | None, expert: int, out: Tensor) -> None:
    if bias is None:
        torch.mm(rows, matrix, out=out)
    else:
        torch.addmm(bias[expert].to(rows.dtype), rows, matrix, out=out)


class _Sort(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD, weight_R, up_EDH, down_EFD, up_bias_EH, down_bias_ED, plan) -> Tensor:
        weights = (up_EDH, down_EFD, up_bias_EH, down_bias_ED)
        y_TD, h_PH = _forward(plan, x_TD, weight_R, weights, keep=True)
        ctx.plan = plan
        ctx.save_for_backward(x_TD, weight_R, *weights, h_PH)
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor):
        x_TD, weight_R, *weights, h_PH = ctx.saved_tensors
        with torch.autocast(x_TD.device.type, enabled=False):
            work = _Backward(ctx.plan, x_TD, weight_R, weights, h_PH, grad_TD.contiguous(), ctx.needs_input_grad[:6])
            for group in ctx.plan.groups:
                work.take(group)
            return *work.finish(), None


class _Backward:
    """The gradients of one backward pass while they are being filled in; lives for that pass alone."""

    def __init__(self, plan: _Plan, x_TD, weight_R, weights, h_PH, grad_TD, wanted) -> None:
        self.plan, self.x_TD, self.weights, self.h_PH, self.grad_TD = plan, x_TD, weights, h_PH, grad_TD
        self.weight_R = weight_R
        want_x, want_weight, *want_stacks = wanted
        dtype, device, D = x_TD.dtype, x_TD.device, x_TD.shape[1]
        self.dx_PD = room((plan.rows, D), dtype, device) if want_x else None
        wide = torch.promote_types(dtype, torch.float32)
        self.weight_P1 = plan.spread(weight_R.to(dtype))[:, None]
        self.dweight_P = torch.empty(plan.rows, dtype=wide, device=device) if want_weight else None
        self.up, self.down = (
            room_like(w) if want else None for w, want in zip(weights[:2], want_stacks[:2], strict=True)
        )
        self.up_bias, self.down_bias = (
            torch.zeros_like(w) if want else None for w, want in zip(weights[2:], want_stacks[2:], strict=True)
        )
        used = {expert for group in plan.groups for expert, _, _ in group}
        for stack in (self.up, self.down):
            for expert in range(weights[0].shape[0]) if stack is not None else ():
                if expert not in used:
                    stack[expert].zero_()
        if plan.groups:
            most, H = plan.most, h_PH.shape[1]
            self.wide = [room((most, D), dtype, device) for _ in range(2)]
            self.narrow = [room((most, plan.hidden), dtype, device) for _ in range(5)]
            self.dh_NH = room((most, H), dtype, device)

    def take(self, group: list[tuple[int, int, int]]) -> None:
        """Fills in what one group of experts contributes."""
        plan, dtype = self.plan, self.x_TD.dtype
        up_EDH, down_EFD, _, down_bias_ED = self.weights
        base, end = group[0][1], group[-1][2]
        x, g = (buffer[: end - base] for buffer in self.wide)
        da, a, *spare = (buffer[: end - base] for buffer in self.narrow)
        dh = self.dh_NH[: end - base]
        parts = [(expert, slice(first - base, last - base)) for expert, first, last in group]
        torch.index_select(self.grad_TD, 0, plan.token_P[base:end], out=g)
        for (_, rows), down in zip(parts, _matrices(down_EFD, group, dtype), strict=True):
            torch.mm(g[rows], down.t(), out=da[rows])
        dweight = None if self.dweight_P is None else self.dweight_P[base:end]
        weight = self.weight_P1[base:end]
        activation_gradient(plan.activation, self.h_PH[base:end], da, weight, a, dh, dweight, tuple(spare))
        if self.up is not None:
            torch.index_select(self.x_TD, 0, plan.token_P[base:end], out=x)
        for expert, rows in parts:
            if self.down is not None:
                _into(self.down[expert], a[rows].t(), g[rows])
            if self.up is not None:
                _into(self.up[expert], x[rows].t(), dh[rows])
            if self.up_bias is not None:
                self.up_bias[expert] = dh[rows].sum(0)
            if self.down_bias is not None:
                self.down_bias[expert] = g[rows].t() @ weight[rows, 0]
            if down_bias_ED is not None and dweight is not None:
                dweight[rows] += g[rows] @ down_bias_ED[expert].to(dtype)
        if self.dx_PD is not None:
            dx = self.dx_PD[base:end]
            for (_, rows), up in zip(parts, _matrices(up_EDH, group, dtype), strict=True):
                torch.mm(dh[rows], up.t(), out=dx[rows])

    def finish(self) -> tuple[Tensor | None, ...]:
        """The gradients of x, the combine weights, and the four stacks."""
        plan, dx, dweight = self.plan, None, None
        if self.dx_PD is not None:
            dx = plan.collect(self.dx_PD, None) if plan.groups else torch.zeros_like(self.x_TD)
        if self.dweight_P is not None:
            dweight = self.dweight_P if plan.place_R is None else self.dweight_P.index_select(0, plan.place_R)
            dweight = dweight.to(self.weight_R.dtype)
        return dx, dweight, self.up, self.down, self.up_bias, self.down_bias


def _into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """The product left @ right, written to ``out`` in its dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)
