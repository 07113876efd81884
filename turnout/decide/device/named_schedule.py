"""A pipeline schedule by the name that a plan gives it, or as the plan has it in full."""

from collections.abc import Callable, Mapping

from turnout.decide.device.dual_pipe_v import dual_pipe_v
from turnout.decide.device.gpipe import gpipe
from turnout.decide.device.interleaved import interleaved, looped_breadth_first
from turnout.decide.device.one_f_one_b import one_f_one_b
from turnout.decide.device.zbv import zbv
from turnout.decide.device.zero_bubble import interleaved_zero_bubble, zb_h1, zb_h2
from turnout.errors import UsageError, nearest, word
from turnout.types.plan import Plan
from turnout.types.schedule import Schedule

__all__ = ["named_schedule", "schedule_of"]

_MADE: Mapping[str, Callable[[int, int], Schedule]] = {
    "GPipe": gpipe,
    "1F1B": one_f_one_b,
    "Interleaved1F1B": interleaved,
    "LoopedBFS": looped_breadth_first,
    "InterleavedZeroBubble": interleaved_zero_bubble,
    "ZBVZeroBubble": zbv,
    "DualPipeV": dual_pipe_v,
    "ZB-H1": zb_h1,
    "ZB-H2": zb_h2,
}


def named_schedule(name: str, ranks: int, microbatches: int) -> Schedule:
    """The schedule of a name, as torch has it or as its paper does.

    Args:
        name: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble, DualPipeV, ZB-H1 or ZB-H2.
        ranks: devices in the pipeline.
        microbatches: how many go through it.

    Raises:
        UnknownNameError: another name.
        UsageError: numbers that the schedule is not made for.

    >>> named_schedule("1F1B", 2, 3).stages
    2

    Source: each schedule's own.
    """
    if name not in _MADE:
        raise nearest(name, _MADE, kind="schedule", where="turnout.decide.device")
    return _MADE[name](ranks, microbatches)


def schedule_of(plan: Plan) -> Schedule:
    """The pipeline schedule that a plan stands for: the one that it has in full, or the one that it names.

    Args:
        plan: with ``actions``, or with a ``schedule``.

    Raises:
        UnknownNameError: a name that there is not.
        UsageError: numbers that the schedule is not made for, other ``stages`` than it has, or ``recompute`` with a
            backward pass in two parts.

    >>> from turnout.types.layout import Layout
    >>> schedule_of(Plan(Layout(pp=2), schedule="ZBVZeroBubble", microbatches=4)).stages
    4

    Source: each schedule's own.
    """

    def refuse(what: str, got: str, allowed: str, fix: str) -> UsageError:
        return UsageError(word(what, got=got, allowed=allowed, where="a plan", fix=fix))

    found = plan.actions or named_schedule(plan.schedule, plan.layout.pp, plan.microbatches)
    if plan.stages is not None and len(plan.stages) != found.stages:
        got, allowed = f"{len(plan.stages)} of them", f"be the {found.stages} of the schedule {found.name}"
        raise refuse("stages", got, allowed, "leave stages out for even ones")
    if plan.recompute and found.splits_backward:
        allowed = f"be False with {found.name}, which splits the backward pass"
        raise refuse("recompute", "True", allowed, "pass schedule='1F1B'")
    return found
