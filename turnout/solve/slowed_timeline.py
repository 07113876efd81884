"""slowed_timeline: as timeline, on resources that slow each other down while they are busy together."""

from collections.abc import Sequence

import numpy as np

from turnout.errors import UsageError, word
from turnout.solve.timeline import Timeline

__all__ = ["slowed_timeline"]


def slowed_timeline(
    order_R: Sequence[Sequence[int]],
    duration_N: Sequence[float],
    needs_N: Sequence[Sequence[int]],
    slowed_RR: Sequence[Sequence[float]],
) -> Timeline:
    """Plays the tasks where each resource works at 1 / (1 + kappa) of its speed while another one is busy.

    Args:
        order_R: for each resource its tasks in order; each task on one.
        duration_N: how long each takes while nothing else runs.
        needs_N: the tasks that must have ended before each.
        slowed_RR: kappa of row r: how much more time resource r takes while the one of the column is busy; of several
            that are, the largest counts.

    Returns:
        Start and end of every task.

    Raises:
        UsageError: orders and needs that wait for each other.

    >>> slowed_timeline([[0], [1]], [1.0, 1.0], [[], []], [[0, 1.0], [0, 0]]).end_N.tolist()
    [1.5, 1.0]

    Source: none; events in the order of time. Wang et al., 2022, "Overlap communication with dependent computation",
        for what a wire costs the chip.
    """
    resources = range(len(order_R))
    place, running = [0] * len(order_R), [-1] * len(order_R)
    start, end = [0.0] * len(duration_N), [-1.0] * len(duration_N)
    left = [0.0] * len(order_R)  # work of the running task that is still to be done
    now, done = 0.0, 0
    while done < len(duration_N):
        for r in resources:
            if running[r] < 0 and place[r] < len(order_R[r]):
                task = order_R[r][place[r]]
                if all(end[need] >= 0 for need in needs_N[task]):
                    running[r], left[r], start[task] = task, duration_N[task], now
                    place[r] += 1
        busy = [r for r in resources if running[r] >= 0]
        if not busy:
            got, allowed = f"{len(duration_N) - done} that wait for each other", "come to an end"
            fix = "ask turnout.solve.timeline which"
            raise UsageError(word("tasks", got=got, allowed=allowed, where="turnout.solve.slowed_timeline", fix=fix))
        more = {r: 1 + max((slowed_RR[r][q] for q in busy if q != r), default=0.0) for r in busy}
        step = min(left[r] * more[r] for r in busy)
        now += step
        for r in busy:
            if left[r] * more[r] <= step:
                end[running[r]], running[r] = now, -1
                done += 1
            else:
                left[r] -= step / more[r]
    return Timeline(np.array(start), np.array(end))
