"""A pipeline schedule by the name that a plan gives it."""

from collections.abc import Callable, Mapping

from turnout.decide.device.dual_pipe_v import dual_pipe_v
from turnout.decide.device.gpipe import gpipe
from turnout.decide.device.interleaved import interleaved, looped_breadth_first
from turnout.decide.device.one_f_one_b import one_f_one_b
from turnout.decide.device.zbv import zbv
from turnout.decide.device.zero_bubble import interleaved_zero_bubble, zb_h1, zb_h2
from turnout.errors import nearest
from turnout.types.schedule import Schedule

__all__ = ["named_schedule"]

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
