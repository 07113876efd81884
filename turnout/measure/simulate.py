"""Simulate: what a pipeline schedule takes at given costs, as a report; an engine's overhead, from its runs."""

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from turnout.errors import UsageError, word
from turnout.expects import expects
from turnout.solve.pipeline import pipeline
from turnout.types import Report, Schedule, StageCosts

__all__ = ["calibrated", "simulate"]

_WHERE = "turnout.measure.calibrated"


@expects(schedule=Schedule, costs=StageCosts)
def simulate(schedule: Schedule, costs: StageCosts) -> Report:
    """Makespan, bubbles and memory of a schedule, by the timed simulator.

    Args:
        schedule: what each device does in which order.
        costs: of its stages; ``calibrated`` gives them an engine's overhead.

    Returns:
        ``makespan`` from the first start to the last end, ``span`` the longest that one device takes (steps without a
        barrier between them), ``bubble`` and ``span_bubble`` the devices' idle shares of these, ``busy_by_rank``,
        ``peak_by_rank`` of activations and gathered parameters in the costs' unit, ``peak`` their largest, and
        ``gathers``, how often parameters are gathered.

    Raises:
        UsageError: costs of another number of stages.

    >>> from turnout.types import Action
    >>> one = Schedule("one", ((Action(0, "F", 0), Action(0, "B", 0)),), (0,), 1)
    >>> simulate(one, StageCosts.even(1, overhead=0.25))["makespan"]
    3.5

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", section 4, for the bubble rate (our ``span_bubble``).
    """
    times = pipeline(schedule, costs)
    values: dict[str, Any] = {
        "makespan": times.makespan,
        "span": times.span,
        "bubble": times.bubble,
        "span_bubble": times.span_bubble,
        "peak": float(times.peak_R.max()),
        "gathers": schedule.count("UNSHARD"),
        "busy_by_rank": times.busy_R.tolist(),
        "peak_by_rank": times.peak_R.tolist(),
    }
    context = {"schedule": schedule.name, "digest": schedule.digest, "stages": schedule.stages}
    return Report(
        f"{schedule.name}, simulated",
        values,
        notes=("simulated, not measured",),
        context=context | {"ranks": schedule.ranks, "microbatches": schedule.microbatches},
    )


@expects(costs=StageCosts)
def calibrated(costs: StageCosts, runs: Sequence[tuple[Schedule, float]]) -> StageCosts:
    """The costs with the overhead for each action with which the simulator meets an engine's runs.

    For each run the overhead is found that gives its makespan; the median of these is taken. What the engine takes less
    than simulated is no overhead: it counts as 0.

    Args:
        costs: of the stages.
        runs: schedules, each with its measured makespan in the costs' unit.

    Returns:
        The same costs with ``overhead``.

    Raises:
        UsageError: no runs, or a makespan that is not positive.

    >>> from turnout.types import Action
    >>> one = Schedule("one", ((Action(0, "F", 0), Action(0, "B", 0)),), (0,), 1)
    >>> round(calibrated(StageCosts.even(1), [(one, 3.5)]).overhead, 6)
    0.25

    Source: bisection; the makespan does not fall as the overhead grows.
    """
    wrong = [time for _, time in runs if not 0 < time < float("inf")]
    if not runs or wrong:
        got, fix = (f"a makespan of {wrong[0]}" if wrong else "none"), "measure a step of one schedule at least"
        raise UsageError(word("runs", got=got, allowed="be schedules with their makespans", where=_WHERE, fix=fix))
    found = [_overhead(costs, schedule, time) for schedule, time in runs]
    return dataclasses.replace(costs, overhead=statistics.median(found))


def _overhead(costs: StageCosts, schedule: Schedule, makespan: float) -> float:
    def taken(overhead: float) -> float:
        return pipeline(schedule, dataclasses.replace(costs, overhead=overhead)).makespan

    low, high = 0.0, makespan
    if taken(low) >= makespan:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if taken(middle) < makespan else (low, middle)
    return (low + high) / 2
