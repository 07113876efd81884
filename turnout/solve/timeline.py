"""Timeline: when each task runs, given the order in which each resource takes its tasks."""

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from turnout.errors import ShapeError, UsageError, word

__all__ = ["Timeline", "timeline"]

_WHERE = "turnout.solve.timeline"
Order = Sequence[Sequence[int]]
Needs = Sequence[Sequence[tuple[int, float]]]


@dataclasses.dataclass(frozen=True, eq=False)
class Timeline:
    """When each of N tasks starts and ends, in the unit of the durations.

    Args:
        start_N: (N,) fp64.
        end_N: (N,) fp64.

    >>> Timeline(np.array([0.0, 1.0]), np.array([1.0, 3.0])).makespan
    3.0

    Source: none; plain bookkeeping.
    """

    start_N: np.ndarray
    end_N: np.ndarray

    @property
    def makespan(self) -> float:
        """When the last task ends; 0 for none."""
        return float(self.end_N.max(initial=0.0))


def timeline(order_R: Order, duration_N: Sequence[float] | np.ndarray, needs_N: Needs) -> Timeline:
    """Plays the tasks: each starts as soon as its resources are free, in their order, and what it needs is done.

    start_n = max(0, end of the task before it on each resource, end_d + lag for each (d, lag) that it needs).

    Args:
        order_R: for each resource its tasks in order. A task on several resources holds all of them at once; every
            task is on at least one.
        duration_N: (N,) how long each takes, finite and at least 0.
        needs_N: for each task the tasks that must have ended, each with a lag: how long after that end it may start.
            A negative lag lets it start before, -duration with the other.

    Returns:
        Start and end of every task.

    Raises:
        ShapeError: durations that are negative or not finite, needs for another number of tasks, an unknown task.
        UsageError: a task on no resource, or twice on one; orders and needs that wait for each other.

    >>> played = timeline([[0, 2], [1]], [1.0, 2.0, 1.0], [[], [(0, 0.5)], [(1, 0.0)]])
    >>> played.start_N.tolist(), played.makespan
    ([0.0, 1.5, 3.5], 4.5)

    Source: Kelley and Walker, 1959, "Critical-Path Planning and Scheduling": the longest path to every task.
    """
    duration = _checked(duration_N, order_R, needs_N)
    order, needs = _one_resource_each(order_R, needs_N, len(duration))
    lists = duration.tolist()
    end = ends(order, lists, needs)
    if end is None:
        raise _circle(order, needs, len(duration))
    end_N = np.array(end, dtype=np.float64)
    return Timeline(end_N - duration, end_N)


def ends(order_R: Order, duration: Sequence[float], needs: Needs) -> list[float] | None:
    """When each task ends, every task being on one resource; None where some wait for each other. Nothing is checked.

    Each resource goes on until what its next task needs is not done yet, and is taken up again once that is: every
    need is looked at once or twice, so that the whole takes about a microsecond a task.
    """
    end: list[float | None] = [None] * len(duration)
    waiting: dict[int, list[int]] = {}
    place, free = [0] * len(order_R), [0.0] * len(order_R)
    todo = list(range(len(order_R)))
    left = sum(map(len, order_R))
    while todo:
        r = todo.pop()
        order, now, blocked = order_R[r], free[r], False
        for at in range(place[r], len(order)):
            task = order[at]
            for need, lag in needs[task]:
                done = end[need]
                if done is None:
                    waiting.setdefault(need, []).append(r)
                    blocked = True
                    break
                if done + lag > now:
                    now = done + lag
            if blocked:
                place[r] = at
                break
            now += duration[task]
            end[task] = now
            left -= 1
            if task in waiting:
                todo += waiting.pop(task)
        # What raised ``now`` before it was blocked is needed by the same task when it is taken up again.
        free[r] = now
    # pyrefly: ignore[bad-return] - once nothing is left, None stands for tasks that no order has
    return None if left else end


def _checked(duration_N: Sequence[float] | np.ndarray, order_R: Order, needs_N: Needs) -> np.ndarray:
    duration = np.asarray(duration_N, dtype=np.float64)
    count = len(duration) if duration.ndim == 1 else -1
    if count < 0 or not np.isfinite(duration).all() or (duration < 0).any():
        got = f"shape {duration.shape}" if count < 0 else "one that is negative or not finite"
        fix = "give one number of at least 0 a task"
        raise ShapeError(word("duration_N", got=got, allowed="be finite and not negative", where=_WHERE, fix=fix))
    if len(needs_N) != count:
        fix = "give an empty list for a task that needs nothing"
        got = f"needs of {len(needs_N)} tasks for {count} durations"
        raise ShapeError(word("needs_N", got=got, allowed="have a list for each task", where=_WHERE, fix=fix))
    if not np.isfinite([lag for needs in needs_N for _, lag in needs]).all():
        fix = "leave out a need that never comes"
        raise ShapeError(word("a lag", got="one that is not", allowed="be finite", where=_WHERE, fix=fix))
    named = {task for order in order_R for task in order} | {need for needs in needs_N for need, _ in needs}
    strange = sorted(task for task in named if not 0 <= task < count)
    if strange:
        fix = "number the tasks as in duration_N"
        raise ShapeError(word("a task", got=strange[0], allowed=f"be in [0, {count})", where=_WHERE, fix=fix))
    return duration


def _one_resource_each(order_R: Order, needs_N: Needs, count: int) -> tuple[Order, Needs]:
    """The same with every task on its first resource alone; its place on the others becomes needs."""
    owner: list[int | None] = [None] * count
    shared = False
    for r, order in enumerate(order_R):
        if len(set(order)) < len(order):
            twice = next(task for task in order if list(order).count(task) > 1)
            fix = "name each task once a resource"
            raise UsageError(word("an order", got=f"task {twice} twice", allowed="be of tasks", where=_WHERE, fix=fix))
        for task in order:
            shared = shared or owner[task] is not None
            owner[task] = r if owner[task] is None else owner[task]
    if None in owner:
        fix = "give it a resource of its own"
        got = f"task {owner.index(None)} on none"
        raise UsageError(word("order_R", got=got, allowed="have every task", where=_WHERE, fix=fix))
    if not shared:
        return order_R, needs_N
    needs: list[list[tuple[int, float]]] = [list(each) for each in needs_N]
    own: list[list[int]] = []
    for r, order in enumerate(order_R):
        own.append([task for task in order if owner[task] == r])
        for before, after in itertools.pairwise(order):
            if owner[before] != r or owner[after] != r:
                needs[after].append((before, 0.0))
    return own, needs


def _circle(order_R: Order, needs: Needs, count: int) -> UsageError:
    """The error for tasks that wait for each other, with a circle of them."""
    waits: list[list[int]] = [[need for need, _ in needs[task]] for task in range(count)]
    for order in order_R:
        for before, after in itertools.pairwise(order):
            waits[after].append(before)
    left = [len(each) for each in waits]
    behind: list[list[int]] = [[] for _ in range(count)]
    for task, each in enumerate(waits):
        for need in each:
            behind[need].append(task)
    free = [task for task in range(count) if not left[task]]
    while free:
        for task in behind[free.pop()]:
            left[task] -= 1
            if not left[task]:
                free.append(task)
    task, path = next(task for task in range(count) if left[task]), []
    while task not in path:
        path.append(task)
        task = next(need for need in waits[task] if left[need])
    circle = [*path[path.index(task) :], task]
    shown = " waits for ".join(map(str, circle[:8])) + (" ..." if len(circle) > 8 else "")
    fix = "change the order of a resource on the way"
    return UsageError(word("tasks", got=shown, allowed="not wait for each other", where=_WHERE, fix=fix))
