"""Sorted dispatch: rows gathered expert by expert, one pair of products per expert, results summed per token.

The whole bank is one autograd function. It keeps only its inputs and the up products, works through the experts in
groups whose intermediate results stay in the processor's cache, recomputes the activations going back, and writes each
expert's gradient straight to its place.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from turnout.run.compiled.passes import backward_pass, forward_pass, suits_passes
from turnout.run.compiled.sums import add_rows, suits_sums
from turnout.run.composed import composes, slopes
from turnout.run.decode import decoder
from turnout.run.plan import Group, Plan, plan_rows
from turnout.run.pointwise import activate_into, activation_gradient
from turnout.run.product import own_alone, product
from turnout.run.reference import as_reference, by_reference, prepare, trains, uncompiled
from turnout.run.slots import Slots
from turnout.run.tiled import tiled_outers, tiled_products
from turnout.run.workspace import room, room_like
from turnout.types import ExpertWeights, Packed, PackedWeights, Routing

__all__ = ["sort", "sort_packed", "sort_slots"]


@uncompiled
@as_reference
def sort(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Each token's weighted sum of its experts' outputs, by one product per expert over rows sorted by expert.

    Kept for the backward pass besides the inputs: the up products, (R, H), and nothing that grows with E. Second and
    further derivatives, and those of torch.func and of forward mode, are ``reference``'s.

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
    train = trains(x_TD, routing, weights)
    if not train and (few := decoder(x_TD, routing, weights)) is not None:
        return few(x_TD, routing, weights, None).to(dtype)
    with torch.autocast(x_TD.device.type, enabled=False):
        tensors = (weights.up_EDH, weights.down_EFD, weights.up_bias_EH, weights.down_bias_ED)
        plan = plan_rows(routing, weights, x_TD, one_call=suits_passes(x_TD, routing, weights))
        if train:
            return _Sort.apply(x_TD, routing.weight_R, *tensors, plan).to(dtype)
        return _forward(plan, x_TD, routing.weight_R, tensors)[0].to(dtype)


def sort_packed(x_TD: Tensor, routing: Routing, weights: PackedWeights) -> Tensor:
    """(T, D) likewise of experts in few bits that ``turnout.run.tiled.suits_tiles``, which stay so; no gradients.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts.

    >>> up = Packed.of(torch.ones(1, 32, 32, dtype=torch.int8), torch.ones(1, 32, 1), group=32, bits=8)
    >>> weights, x_TD = PackedWeights(up, up, activation="relu"), torch.ones(1, 32)
    >>> routing = Routing.from_topk(torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1), num_experts=1)
    >>> from turnout.run.tiled import suits_tiles
    >>> y_TD = sort_packed(x_TD, routing, weights) if suits_tiles(x_TD, weights, 1) else x_TD * 1024
    >>> y_TD.unique()
    tensor([1024.])

    Source: none; our own.
    """
    stacks = weights.up, weights.down, weights.up_bias_EH, weights.down_bias_ED
    return _forward(plan_rows(routing, weights, x_TD), x_TD, routing.weight_R, stacks)[0]


def sort_slots(x_TD: Tensor, routing: Routing, slots: Slots) -> Tensor:
    """(T, D) likewise of experts that come into slots, with the bits of those that are all in memory; no gradients.

    Args:
        x_TD: (T, D), the tokens, in the dtype of the experts where those are whole.
        routing: which experts each takes, and with what weight.
        slots: the experts.

    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> slots = Slots(weights, weights, limit=1, take=lambda experts, more: experts)
    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> sort_slots(torch.ones(1, 3), routing, slots)
    tensor([[6., 6., 6.]])

    Source: none; our own.
    """
    like = slots.like
    if isinstance(like, PackedWeights):
        stacks = like.up, like.down, like.up_bias_EH, like.down_bias_ED
        return _forward(plan_rows(routing, like, x_TD), x_TD, routing.weight_R, stacks, slots=slots)[0]
    plan = plan_rows(routing, like, x_TD, one_call=suits_passes(x_TD, routing, like))
    tensors = (like.up_EDH, like.down_EFD, like.up_bias_EH, like.down_bias_ED)
    return _forward(plan, x_TD, routing.weight_R, tensors, slots=slots)[0]


_Stack = Tensor | Packed
_Weights = tuple[_Stack, _Stack, Tensor | None, Tensor | None]


def _products(
    group: Group, rows: Tensor, stack: _Stack, out: Tensor, bias: Tensor | None = None, slots: Slots | None = None
) -> None:
    """Each expert's rows times its matrix of ``stack`` (E, I, O), plus its bias, written to ``out``."""
    own = tiled_products(rows, stack, len(group.experts), out)
    if slots is not None:
        _by_slots(group, rows, stack, out, slots, own)
    elif own is not None:
        own(rows, stack, group.experts, group.bound, out)
    else:
        assert isinstance(stack, Tensor)  # or whoever asked did not ask suits_tiles first
        _by_torch(group, rows, stack, out)
    if bias is not None:
        for expert, into in zip(group.experts, group.split(out), strict=True):
            into.add_(bias[expert])


def _by_slots(group: Group, rows: Tensor, stack: _Stack, out: Tensor, slots: Slots, own: Any) -> None:
    """The same where experts come into slots, as many at a time as fit: each product is the one that it would be."""
    held, first = slots.stack(stack), group.bound[0]
    if own is None and group.batched:
        count = len(group.experts)
        matrices = slots.gathered(stack, group.experts)
        _by_torch(Group([*range(count)], group.bound, True), rows, matrices, out)
        return
    for place, there in slots.some(group.experts):
        bound = group.bound[place.start : place.stop + 1]
        part = slice(bound[0] - first, bound[-1] - first)
        if own is not None:
            own(rows[part], held, there, bound, out[part])
            continue
        assert isinstance(held, Tensor)
        for slot, start, end in zip(there, bound, bound[1:], strict=False):
            its = slice(start - first, end - first)
            _by_torch(Group([slot], [start, end], False), rows[its], held, out[its])


def _by_torch(group: Group, rows: Tensor, stack: Tensor, out: Tensor) -> None:
    first, count, cast = group.experts[0], len(group.experts), stack.dtype != rows.dtype
    matrices = stack[first : group.experts[-1] + 1]
    if group.batched:
        matrices = matrices.to(rows.dtype) if cast else matrices
        torch.bmm(rows.view(count, -1, rows.shape[1]), matrices, out=out.view(count, -1, out.shape[1]))
    else:
        each, own = matrices.unbind(0), own_alone(rows.dtype, rows.numel() * stack.shape[2])
        for expert, left, into in zip(group.experts, group.split(rows), group.split(out), strict=True):
            matrix = each[expert - first].to(rows.dtype) if cast else each[expert - first]
            if own:
                torch.mm(left, matrix, out=into)
            else:
                product(left, matrix, out_MN=into)


def _outer(group: Group, left: Tensor, right: Tensor, grad: Tensor) -> None:
    """Each expert's left^T right over its rows, written to its place in ``grad`` (E, I, O) in that dtype."""
    if grad.stride(1) == 1 and grad.stride(2) != 1:  # stored (E, O, I): make it there directly
        left, right, grad = right, left, grad.transpose(1, 2)
    if tiled_outers(left, right, group.experts, group.bound, grad):
        return
    first, count, cast = group.experts[0], len(group.experts), grad.dtype != left.dtype
    if group.batched:
        pair = left.view(count, -1, left.shape[1]).transpose(1, 2), right.view(count, -1, right.shape[1])
        if cast:
            grad[first : first + count] = torch.bmm(*pair)
        else:
            torch.bmm(*pair, out=grad[first : first + count])
        return
    each, own = grad[first : group.experts[-1] + 1].unbind(0), own_alone(left.dtype, left.numel() * right.shape[1])
    for expert, a, b in zip(group.experts, group.split(left), group.split(right), strict=True):
        if cast:
            each[expert - first].copy_(a.t() @ b)
        elif own:
            torch.mm(a.t(), b, out=each[expert - first])
        else:
            product(a.t(), b, out_MN=each[expert - first])


class _Sum:
    """The sum of each token's rows, made while they are in the cache where that is compiled, else of all at the end."""

    def __init__(self, plan: Plan, like_TD: Tensor, weight_R: Tensor | None) -> None:
        self.plan, self.weight_R, self.dtype = plan, weight_R, like_TD.dtype
        self.at_once = suits_sums(like_TD)
        if self.at_once:
            self.weight_R = None if weight_R is None else weight_R.detach().float().contiguous()
            self.sum_TD = like_TD.new_zeros(like_TD.shape, dtype=torch.float32)
        rows = plan.most if self.at_once else plan.rows
        self.row_PD = room((rows, like_TD.shape[1]), like_TD.dtype, like_TD.device)

    def rows(self, group: Group) -> Tensor:
        """Where the group's rows go."""
        return self.row_PD[: group.bound[-1] - group.bound[0]] if self.at_once else self.row_PD[group.rows]

    def add(self, group: Group) -> None:
        """The group's rows are there."""
        if self.at_once:
            plan, which = self.plan, self.plan.entries(group)
            place = None if plan.place_R is None else plan.place_R[which]
            weight = None if self.weight_R is None else self.weight_R[which]
            of = {"place_M": place, "first": group.bound[0], "weight_M": weight}
            add_rows(self.row_PD, plan.routing.token_R[which], self.sum_TD, **of)

    def total(self) -> Tensor:
        """(T, D)."""
        return self.sum_TD.to(self.dtype) if self.at_once else self.plan.collect(self.row_PD, self.weight_R)


def _forward(
    plan: Plan, x_TD: Tensor, weight_R: Tensor, weights: _Weights, keep: bool = False, slots: Slots | None = None
) -> tuple[Tensor, Tensor]:
    """The output, and the up products, of all rows if they are to be kept."""
    up_EDH, down_EFD, up_bias_EH, down_bias_ED = weights
    dtype, device, D, H = x_TD.dtype, x_TD.device, x_TD.shape[1], _outs(up_EDH)
    if not plan.groups:
        return x_TD.new_zeros(x_TD.shape), x_TD.new_empty(0, H)
    most = plan.most
    x_ND, a_NF = room((most, D), dtype, device), room((most, plan.hidden), dtype, device)
    h_PH = room((plan.rows if keep else most, H), dtype, device)
    y_PD = _Sum(plan, x_TD, weight_R)
    if plan.one_call:
        assert isinstance(up_EDH, Tensor) and isinstance(down_EFD, Tensor)  # as suits_passes asks
        for some, up, down in _calls(plan, up_EDH, down_EFD, slots):
            forward_pass(some, x_TD, weight_R, up, down, h_PH, y_PD.sum_TD)
        return y_PD.total(), h_PH
    for group in plan.groups:
        count = group.bound[-1] - group.bound[0]
        x, a, h = x_ND[:count], a_NF[:count], h_PH[group.rows] if keep else h_PH[:count]
        torch.index_select(x_TD, 0, plan.token_P[group.rows], out=x)
        _products(group, x, up_EDH, h, up_bias_EH, slots)
        activate_into(h, plan.activation, a, interleaved=plan.interleaved)
        _products(group, a, down_EFD, y_PD.rows(group), down_bias_ED, slots)
        y_PD.add(group)
    return y_PD.total(), h_PH


def _calls(plan: Plan, up_EDH: Tensor, down_EFD: Tensor, slots: Slots | None) -> Iterator[tuple[Plan, Any, Any]]:
    """Parts of a plan whose passes are one call each, and matrices: the whole, or as many experts as come at once."""
    if slots is None:
        yield plan, up_EDH, down_EFD
        return
    held = slots.stack(up_EDH), slots.stack(down_EFD)
    experts = [expert for group in plan.groups for expert in group.experts]
    bound = [plan.groups[0].bound[0], *(end for group in plan.groups for end in group.bound[1:])]
    begins = {group.bound[0] for group in plan.groups}
    for place, there in slots.some(experts):
        groups: list[Group] = []
        for slot, at in zip(there, range(place.start, place.stop), strict=True):
            if not groups or bound[at] in begins:
                groups.append(Group([], [bound[at]], False))
            groups[-1].experts.append(slot)
            groups[-1].bound.append(bound[at + 1])
        yield dataclasses.replace(plan, groups=groups), *held


def _outs(stack: _Stack) -> int:
    return stack.shape[1] if isinstance(stack, Packed) else stack.shape[2]


class _Sort(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD, weight_R, up_EDH, down_EFD, up_bias_EH, down_bias_ED, plan) -> Tensor:
        weights = (up_EDH, down_EFD, up_bias_EH, down_bias_ED)
        y_TD, h_PH = _forward(plan, x_TD, weight_R, weights, keep=True)
        if plan.packs:
            h_PH = torch.index_select(h_PH, 0, plan.place_R)
        ctx.plan = plan
        ctx.save_for_backward(x_TD, weight_R, *weights, h_PH)
        return y_TD

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        x_TD, weight_R, *weights, h_PH = ctx.saved_tensors
        if composes(grad_TD):
            plan, inputs = ctx.plan, (x_TD, weight_R, *weights)
            composition = by_reference(plan.routing, plan.activation, plan.interleaved)
            return *slopes(composition, inputs, ctx.needs_input_grad[:6], grad_TD), None
        with torch.autocast(x_TD.device.type, enabled=False):
            work = _Backward(ctx.plan, x_TD, weight_R, weights, h_PH, grad_TD.contiguous(), ctx.needs_input_grad[:6])
            if ctx.plan.one_call:
                work.take_all()
            for group in () if ctx.plan.one_call else ctx.plan.groups:
                work.take(group)
            return *work.finish(), None


class _Backward:
    """The gradients of one backward pass while they are being filled in; lives for that pass alone."""

    def __init__(self, plan: Plan, x_TD, weight_R, weights, h_PH, grad_TD, wanted) -> None:
        self.plan, self.x_TD, self.weights, self.h_PH, self.grad_TD = plan, x_TD, weights, h_PH, grad_TD
        self.weight_R = weight_R
        want_x, want_weight, *want = wanted
        dtype, device, D = x_TD.dtype, x_TD.device, x_TD.shape[1]
        self.want_x = want_x
        self.dx_PD = _Sum(plan, x_TD, None) if want_x and plan.groups else None
        wide = torch.promote_types(dtype, torch.float32)
        self.weight_P1 = plan.spread(weight_R.to(dtype))[:, None]
        self.dweight_P = torch.empty(plan.rows, dtype=wide, device=device) if want_weight else None
        self.up, self.down = (room_like(w) if wish else None for w, wish in zip(weights[:2], want[:2], strict=True))
        self.up_bias, self.down_bias = (
            torch.zeros_like(w) if wish else None for w, wish in zip(weights[2:], want[2:], strict=True)
        )
        idle = set(range(weights[0].shape[0])).difference(*(group.experts for group in plan.groups))
        for stack in (self.up, self.down):
            if stack is not None:
                for expert in idle:
                    stack[expert].zero_()
        if plan.groups:
            most, H = plan.most, h_PH.shape[1]
            self.wide = [room((most, D), dtype, device) for _ in range(2)]
            self.narrow = [room((most, plan.hidden), dtype, device) for _ in range(5)]
            self.dh_NH = room((most, H), dtype, device)
            self.h_NH = room((most, H), dtype, device) if plan.packs else None

    def take_all(self) -> None:
        """Fills in what all groups contribute, in one call."""
        sum_TD = None if self.dx_PD is None else self.dx_PD.sum_TD
        given = self.plan, self.x_TD, self.weight_R, *self.weights[:2], self.h_PH, self.grad_TD
        backward_pass(*given, sum_TD=sum_TD, up=self.up, down=self.down, of_weight_R=self.dweight_P)

    def take(self, group: Group) -> None:
        """Fills in what one group of experts contributes."""
        plan, rows = self.plan, group.rows
        up_EDH, down_EFD, _, _ = self.weights
        count = group.bound[-1] - group.bound[0]
        x, g = (buffer[:count] for buffer in self.wide)
        da, a, *spare = (buffer[:count] for buffer in self.narrow)
        dh, weight = self.dh_NH[:count], self.weight_P1[rows]
        if self.h_NH is None or plan.entry_P is None:
            h = self.h_PH[rows]
        else:
            h = torch.index_select(self.h_PH, 0, plan.entry_P[rows], out=self.h_NH[:count])
        dweight = None if self.dweight_P is None else self.dweight_P[rows]
        torch.index_select(self.grad_TD, 0, plan.token_P[rows], out=g)
        _products(group, g, down_EFD.transpose(1, 2), da)
        activation_gradient(plan.activation, h, da, weight, a, dh, dweight, spare, interleaved=plan.interleaved)
        if self.down is not None:
            _outer(group, a, g, self.down)
        if self.up is not None:
            _outer(group, torch.index_select(self.x_TD, 0, plan.token_P[rows], out=x), dh, self.up)
        if self.dx_PD is not None:
            _products(group, dh, up_EDH.transpose(1, 2), self.dx_PD.rows(group))
            self.dx_PD.add(group)
        if self.weights[2] is not None or self.weights[3] is not None:
            self._take_biases(group, g, dh, weight, dweight)

    def _take_biases(self, group: Group, g: Tensor, dh: Tensor, weight: Tensor, dweight: Tensor | None) -> None:
        bias_ED, rows = self.weights[3], group.split
        dweights = group.split(dweight) if dweight is not None else [None] * len(group.experts)
        parts = zip(group.experts, rows(g), rows(dh), rows(weight), dweights, strict=True)
        for expert, g_ND, dh_NH, weight_N1, dweight_N in parts:
            if self.up_bias is not None:
                self.up_bias[expert] = dh_NH.sum(0)
            if self.down_bias is not None:
                self.down_bias[expert] = g_ND.t() @ weight_N1[:, 0]
            if bias_ED is not None and dweight_N is not None:
                dweight_N.add_(g_ND @ bias_ED[expert].to(g_ND.dtype))

    def finish(self) -> tuple[Tensor | None, ...]:
        """The gradients of x, the combine weights, and the four stacks."""
        plan, dx, dweight = self.plan, None, None
        if self.want_x:
            dx = torch.zeros_like(self.x_TD) if self.dx_PD is None else self.dx_PD.total()
        if self.dweight_P is not None:
            dweight = self.dweight_P if plan.place_R is None else self.dweight_P.index_select(0, plan.place_R)
            dweight = dweight.to(self.weight_R.dtype)
        return dx, dweight, self.up, self.down, self.up_bias, self.down_bias
