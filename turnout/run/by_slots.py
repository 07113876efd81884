"""Experts that come into slots: run by the executor, and in the groups, that all of them in memory would be."""

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.run.choose import choose
from turnout.run.decode import decoder
from turnout.run.grouped import grouped_slots
from turnout.run.packed import packed_experts
from turnout.run.reference import prepare
from turnout.run.slots import Slots
from turnout.run.sort import sort_slots
from turnout.types import PackedWeights, Routing
from turnout.types.invariant import refuse_invariant

__all__ = ["experts_by_slots"]

_WHERE = "turnout.run.experts_by_slots"


def experts_by_slots(x_TD: Tensor, routing: Routing, slots: Slots, *, backend: str = "auto") -> Tensor:
    """(T, D), each token's weighted sum of its experts' outputs: the bits of ``execute`` over experts in memory.

    Experts in few bits are run as ``packed_experts`` runs them.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        slots: the experts.
        backend: "auto", "sort" or "grouped"; others need all experts at once.

    Raises:
        ShapeError: tokens, routing and experts do not fit each other.
        UsageError: another backend, dtypes that differ, gradients that are asked for, or a device that is no CPU.

    >>> from turnout.types import ExpertWeights
    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> slots = Slots(weights, weights, limit=1, take=lambda experts, more: experts)
    >>> routing = Routing.from_topk(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.5]]), num_experts=2)
    >>> experts_by_slots(torch.ones(1, 3), routing, slots)
    tensor([[12., 12., 12.]])

    Source: none; our own.
    """
    if torch.compiler.is_compiling():  # threads and files are no part of a graph
        return torch.compiler.disable(experts_by_slots)(x_TD, routing, slots, backend=backend)
    fix = "read the model without expert_memory"
    refuse_invariant("experts that come into slots", _WHERE, fix)
    if backend not in ("auto", "sort", "grouped"):
        allowed, fix = 'be "auto", "sort" or "grouped" where experts come into slots', 'pass backend="auto"'
        raise UsageError(word("backend", got=backend, allowed=allowed, where=_WHERE, fix=fix))
    if x_TD.device.type != "cpu":
        fix = "bring the model to the CPU, or read it without expert_memory"
        raise UsageError(word("x_TD", got=f"on {x_TD.device}", allowed="be on the CPU", where=_WHERE, fix=fix))
    like = slots.like
    if torch.is_grad_enabled() and (x_TD.requires_grad or routing.weight_R.requires_grad):
        fix = "run it under torch.no_grad(), or read the model without expert_memory to train it"
        got = "a call that asks for gradients"
        raise UsageError(word("experts in slots", got=got, allowed="be run without", where=_WHERE, fix=fix))
    if isinstance(like, PackedWeights):
        return packed_experts(x_TD, routing, like, backend=backend, slots=slots)
    name = choose(x_TD, routing, like).name if backend == "auto" else backend
    if name == "grouped":
        return grouped_slots(x_TD, routing, slots)
    dtype = x_TD.dtype
    x_TD, like = prepare(x_TD, routing, like, cast_weights=False)
    if (few := decoder(x_TD, routing, like)) is not None:
        return few(x_TD, routing, like, slots).to(dtype)
    with torch.autocast(x_TD.device.type, enabled=False):
        return sort_slots(x_TD, routing, slots).to(dtype)
