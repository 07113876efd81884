"""What two trainings took beside what they reached: the ratio of times, and both curves where the shorter ends."""

import dataclasses
import itertools
import statistics
from collections.abc import Sequence

from turnout.measure.ranking import one_machine
from turnout.measure.runs import RunData, number

__all__ = ["EqualTime", "equal_time", "flops_ratio"]


@dataclasses.dataclass(frozen=True)
class EqualTime:
    """One kind of run against another, by the clock of one machine.

    Args:
        times: how many times the other's training time this one's took.
        seconds: when the shorter of all runs ended.
        bits: held-out bits per byte of this one at that time, between two evaluations along a straight line.
        other_bits: the same of the other.

    Source: none; plain bookkeeping.
    """

    times: float
    seconds: float
    bits: float
    other_bits: float


def equal_time(runs: Sequence[RunData], others: Sequence[RunData]) -> EqualTime | None:
    """Both at the time when the shorter training ended; each kind may have several seeds, of which the mean counts.

    A run that is cut off there was in the middle of its learning-rate schedule: planned for that time it would have
    come somewhat lower. Time is that of training with its evaluations and checkpoints, without pauses.

    Args:
        runs: finished runs of one kind.
        others: finished runs of another.

    Returns:
        None where time does not compare: other machines or numbers of threads, runs that go on or did not log their
        time, other bytes in their evaluations, or no evaluation yet when the shorter ended.

    >>> line = {"kind": "eval", "bytes": 9}
    >>> def run(*points):
    ...     lines = tuple(line | {"step": s, "seconds": s, "bits_per_byte": b} for s, b in points)
    ...     return RunData("x", metrics=lines, result={"bits_per_byte": 1.0}, hardware={"cpu": "y"})
    >>> equal_time([run((10, 3.0), (30, 1.0))], [run((10, 3.5), (20, 2.5))])
    EqualTime(times=1.5, seconds=20.0, bits=2.0, other_bits=2.5)

    Source: none; linear interpolation.
    """
    both = [*runs, *others]
    curves = [_curve(run) for run in both]
    sizes = {line.get("bytes") for run in both for line in run.lines("eval")}
    if (
        not runs
        or not others
        or not one_machine(both)
        or not all(run.result for run in both)
        or len(sizes) != 1
        or None in sizes
    ):
        return None
    if not all(curves):
        return None
    ends = [curve[-1][0] for curve in curves]
    at = min(ends)
    if at <= 0 or any(curve[0][0] > at for curve in curves):
        return None
    bits, count = [_between(curve, at) for curve in curves], len(runs)
    times = statistics.fmean(ends[:count]) / statistics.fmean(ends[count:])
    return EqualTime(times, at, statistics.fmean(bits[:count]), statistics.fmean(bits[count:]))


def flops_ratio(runs: Sequence[RunData], others: Sequence[RunData]) -> float | None:
    """How many times the other's FLOPs of training this kind of run took; None where some do not say.

    Forward FLOPs a token times tokens; both pay about twice that again for their gradients.

    >>> from turnout.types import Cost
    >>> line = {"kind": "train", "step": 1, "tokens": 10}
    >>> one, two = (RunData("x", metrics=(line,), cost=Cost(flops=f)) for f in (2.0, 4.0))
    >>> flops_ratio([one], [two])
    0.5

    Source: none; plain arithmetic.
    """
    totals = [[(run.cost.flops or 0.0) * (run.tokens or 0) for run in kind] for kind in (runs, others)]
    if not all(total and all(total) for total in totals):
        return None
    return statistics.fmean(totals[0]) / statistics.fmean(totals[1])


def _curve(run: RunData) -> list[tuple[float, float]]:
    """When each evaluation was, and what it found; empty where one does not say."""
    points = [(number(line.get("seconds")), number(line.get("bits_per_byte"))) for line in run.lines("eval")]
    known = [(at, bits) for at, bits in points if at is not None and bits is not None]
    return known if len(known) == len(points) else []


def _between(curve: Sequence[tuple[float, float]], at: float) -> float:
    for (before, high), (after, low) in itertools.pairwise(curve):
        if before <= at <= after:
            return high + (low - high) * ((at - before) / (after - before) if after > before else 1.0)
    return curve[-1][1]
