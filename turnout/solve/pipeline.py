"""Pipeline: a schedule of stages' actions, played in time at given costs."""

import dataclasses
import functools
import itertools

import numpy as np

from turnout.errors import UsageError, word
from turnout.solve.timeline import Needs, ends
from turnout.types.schedule import Action, Schedule
from turnout.types.stage_costs import StageCosts

__all__ = ["PipelineTimes", "pipeline"]


@dataclasses.dataclass(frozen=True, eq=False)
class PipelineTimes:
    """When each action of a schedule runs, and what follows from it.

    Args:
        start_R: for each device (A,) fp64, when its actions start; UNSHARD runs beside the others, RESHARD takes no
            time.
        end_R: for each device when they end.
        busy_R: (R,) how long each device computes.
        peak_R: (R,) the most that activations and gathered parameters hold on each device at a time.

    >>> from turnout.types import Action, Schedule
    >>> one = Schedule("one", ((Action(0, "F", 0), Action(0, "B", 0)),), (0,), 1)
    >>> times = pipeline(one, StageCosts.even(1))
    >>> times.makespan, times.bubble, times.peak_R.tolist()
    (3.0, 0.0, [1.0])

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", section 4: (cost - m (T_F + T_B + T_W)) / cost.
    """

    start_R: tuple[np.ndarray, ...]
    end_R: tuple[np.ndarray, ...]
    busy_R: np.ndarray
    peak_R: np.ndarray

    @property
    def makespan(self) -> float:
        """From the first start to the last end: what a step takes where all devices wait for each other after it."""
        return max(float(end.max(initial=0.0)) for end in self.end_R)

    @property
    def span(self) -> float:
        """The longest that any device takes from its first start to its last end: what steps without a barrier take."""
        return max(
            float(end.max(initial=0.0) - start.min(initial=np.inf)) if len(end) else 0.0
            for start, end in zip(self.start_R, self.end_R, strict=True)
        )

    @property
    def bubble(self) -> float:
        """The share of all devices' makespan in which they do not compute."""
        return _idle(self.busy_R, self.makespan)

    @property
    def span_bubble(self) -> float:
        """The same of ``span``: the papers' bubble rate of zero-bubble schedules, whose steps have no barrier."""
        return _idle(self.busy_R, self.span)


def pipeline(schedule: Schedule, costs: StageCosts) -> PipelineTimes:
    """Plays a schedule: every action starts when its device is free and what it needs has arrived.

    A forward needs that of the stage before, a backward that of the stage behind, ``costs.send`` later where these are
    on other devices. UNSHARD runs beside the computing: it may start with the action before it in the order.

    Args:
        schedule: what is done in which order.
        costs: of its stages.

    Returns:
        The times of all actions.

    Raises:
        UsageError: costs of another number of stages.

    >>> from turnout.types import Action, Schedule
    >>> F0, B0, F1, B1 = (Action(s, kind, 0) for s in (0, 1) for kind in "FB")
    >>> pipeline(Schedule("two", ((F0, B0), (F1, B1)), (0, 1), 1), StageCosts.even(2, send=0.5)).makespan
    7.0

    Source: Huang et al., 2019, "GPipe"; Qi et al., 2024, "Zero Bubble Pipeline Parallelism".
    """
    if costs.stages != schedule.stages:
        got, allowed = f"costs of {costs.stages} stages", f"be of the schedule's {schedule.stages} stages"
        fix = "StageCosts.cut cuts every stage into several"
        raise UsageError(word("costs", got=got, allowed=allowed, where="turnout.solve.pipeline", fix=fix))
    count = schedule.stages * schedule.microbatches
    duration = durations(costs, schedule.microbatches)
    needs: Needs = stage_needs(schedule.rank_of_stage, schedule.microbatches, costs.send)
    full = [time + costs.overhead for time in costs.full_S]
    orders, tasks = [], []
    for order in schedule.actions:
        named = []
        for stage, kind, microbatch, _ in order:
            if microbatch is None:
                task = -1
            else:
                task = stage * schedule.microbatches + microbatch
                if kind != "F":
                    task += count if kind != "W" else 2 * count
                    if kind == "B":
                        duration[task] = full[stage]
            named.append(task)
        tasks.append(named)
        orders.append(named)
    if any(-1 in named for named in tasks):
        orders, tasks, needs = _odd_ones(schedule, costs, duration, tasks, needs)
    end = ends(orders, duration, needs)
    assert end is not None  # a Schedule can always run
    return _times(schedule, costs, duration, end, tasks, count)


def durations(costs: StageCosts, microbatches: int) -> list[float]:
    """Of task stage x microbatches + microbatch of F, then of all I, then of all W."""
    three = np.array([costs.forward_S, costs.input_S, costs.weight_S], dtype=np.float64) + costs.overhead
    return np.repeat(three.reshape(-1), microbatches).tolist()


@functools.lru_cache(maxsize=64)
def stage_needs(
    rank_of_stage: tuple[int, ...], microbatches: int, send: float
) -> tuple[tuple[tuple[int, float], ...], ...]:
    """What each task needs of other stages, numbered as in ``durations``; what it needs of its own is in the order."""
    stages = len(rank_of_stage)
    lag = [0.0 if a == b else send for a, b in itertools.pairwise(rank_of_stage)]
    count = stages * microbatches
    forward = [
        () if s == 0 else ((s - 1) * microbatches + m, lag[s - 1]) for s in range(stages) for m in range(microbatches)
    ]
    back = [
        () if s == stages - 1 else (count + (s + 1) * microbatches + m, lag[s])
        for s in range(stages)
        for m in range(microbatches)
    ]
    return (*(((each,) if each else ()) for each in forward + back), *[()] * count)


def _odd_ones(
    schedule: Schedule, costs: StageCosts, duration: list[float], tasks: list[list[int]], needs: Needs
) -> tuple[list[list[int]], list[list[int]], Needs]:
    """The same with pairs, which are one task, and parameters, whose gathering runs on a resource of its own."""
    longer = [list(each) for each in needs]
    alias = list(range(len(longer)))
    orders: list[list[int]] = []
    count, microbatches = schedule.stages * schedule.microbatches, schedule.microbatches
    gather_S = costs.gather_S or (0.0,) * schedule.stages
    for order, named in zip(schedule.actions, tasks, strict=True):
        computing: list[int] = []
        gathering: list[int] = []
        gathered: dict[int, int] = {}
        dropped = False
        for place, action in enumerate(order):
            if action.kind == "UNSHARD":
                named[place] = task = len(duration)
                duration.append(gather_S[action.stage])
                alias.append(task)
                before = computing[-1] if computing else None
                lag = 0.0 if dropped or before is None else -duration[before]
                longer.append([] if before is None else [(before, lag)])
                gathering.append(task)
                gathered[action.stage], dropped = task, False
                continue
            if action.kind == "RESHARD":
                gathered.pop(action.stage, None)
                dropped = True
                continue
            if action.parts:
                named[place] = _pair(action, costs, duration, longer, alias, microbatches, count)
            task, dropped = named[place], False
            computing.append(task)
            longer[task] += [
                (gathered[part.stage], 0.0) for part in (action.parts or (action,)) if part.stage in gathered
            ]
        orders += [computing, gathering]
    return orders, tasks, [[(alias[need], lag) for need, lag in each] for each in longer]


def _pair(
    action: Action,
    costs: StageCosts,
    duration: list[float],
    needs: list[list[tuple[int, float]]],
    alias: list[int],
    microbatches: int,
    count: int,
) -> int:
    """F and B of a pair as the one task that F was: it needs what both do, and ends for both when it ends."""
    time = 0.0
    ids = []
    for stage, kind, microbatch, _ in action.parts:
        assert microbatch is not None
        ids.append(stage * microbatches + microbatch + {"F": 0, "W": 2 * count}.get(kind, count))
        kinds = {"F": costs.forward_S, "I": costs.input_S, "W": costs.weight_S, "B": costs.full_S}
        time += kinds[kind][stage]
    first = ids[0]
    duration[first] = costs.together * time + len(ids) * costs.overhead
    for other in ids[1:]:
        alias[other] = first
        needs[first] += needs[other]
    return first


def _times(
    schedule: Schedule, costs: StageCosts, duration: list[float], end: list[float], tasks: list[list[int]], count: int
) -> PipelineTimes:
    held, kept = costs.held_S, costs.kept
    parameters = costs.parameters_S or (0.0,) * schedule.stages
    change = {
        "F": held,
        "I": [-(1 - kept) * one for one in held],
        "W": [-kept * one for one in held],
        "B": [-one for one in held],
        "UNSHARD": parameters,
        "RESHARD": [-one for one in parameters],
    }
    start_R, end_R, busy, peak = [], [], [], []
    for order, named in zip(schedule.actions, tasks, strict=True):
        now, last, moves, ended, took = 0.0, 0.0, [], [], []
        for action, task in zip(order, named, strict=True):
            if task >= 0:
                last = end[task]
            ended.append(last)
            took.append(duration[task] if task >= 0 else 0.0)
            if action.parts:
                moves += [change[part.kind][part.stage] for part in action.parts]
            else:
                moves.append(change[action.kind][action.stage])
            if task < 3 * count and task >= 0:
                now += duration[task]
        end_A = np.array(ended)
        end_R.append(end_A)
        start_R.append(end_A - np.array(took))
        busy.append(now)
        peak.append(float(np.cumsum(moves).max(initial=0.0)))
    return PipelineTimes(tuple(start_R), tuple(end_R), np.array(busy), np.array(peak))


def _idle(busy_R: np.ndarray, time: float) -> float:
    return 1.0 - float(busy_R.sum()) / (len(busy_R) * time) if time else 0.0
