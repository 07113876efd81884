"""list_schedule: whenever a resource is free it takes the most urgent task that is ready."""

import heapq
from collections.abc import Sequence

__all__ = ["list_schedule", "urgency"]


def list_schedule(
    resource_N: Sequence[int],
    duration_N: Sequence[float],
    needs_N: Sequence[Sequence[int]],
    rank_N: Sequence[float],
    behind_N: Sequence[Sequence[int]] | None = None,
) -> list[list[int]]:
    """The order of the tasks on each resource when none idles while a task of it is ready; the lowest rank goes first.

    Args:
        resource_N: which resource each task occupies, counted from 0.
        duration_N: how long each takes.
        needs_N: the tasks that must have ended before each.
        rank_N: how urgent each is: lower is sooner. Equal ones go in the order of their numbers.
        behind_N: ``needs_N`` the other way round, where the caller has it.

    Returns:
        For each resource its tasks in order; ``timeline`` says when they run. A task that waits for itself, through
        others, is in none.

    >>> list_schedule([0, 1, 0, 1], [1.0, 2.0, 1.0, 2.0], [[], [0], [], [2]], [1.0, 0.0, 0.0, 0.0])
    [[2, 0], [3, 1]]

    Source: Graham, 1966, "Bounds for certain multiprocessing anomalies".
    """
    behind = behind_N if behind_N is not None else _behind(needs_N)
    left = [len(needs) for needs in needs_N]
    count = max(resource_N, default=-1) + 1
    ready: list[list[tuple[float, int]]] = [[] for _ in range(count)]
    order: list[list[int]] = [[] for _ in range(count)]
    free, running = [True] * count, []
    for task, waits in enumerate(left):
        if not waits:
            ready[resource_N[task]].append((rank_N[task], task))
    for heap in ready:
        heapq.heapify(heap)
    now, touched = 0.0, list(range(count))
    while True:
        for resource in touched:
            if free[resource] and ready[resource]:
                task = heapq.heappop(ready[resource])[1]
                order[resource].append(task)
                free[resource] = False
                heapq.heappush(running, (now + duration_N[task], task))
        if not running:
            return order
        now, touched = running[0][0], []
        while running and running[0][0] <= now:
            task = heapq.heappop(running)[1]
            free[resource_N[task]] = True
            touched.append(resource_N[task])
            for then in behind[task]:
                left[then] -= 1
                if not left[then]:
                    heapq.heappush(ready[resource_N[then]], (rank_N[then], then))
                    touched.append(resource_N[then])


def urgency(duration_N: Sequence[float], needs_N: Sequence[Sequence[int]]) -> list[float]:
    """The rank of each task by the longest chain of work that begins with it: the longest has the lowest.

    >>> urgency([1.0, 2.0, 4.0], [[], [0], [0]])
    [-5.0, -2.0, -4.0]

    Source: Hu, 1961, "Parallel sequencing and assembly line problems": critical path first.
    """
    behind = _behind(needs_N)
    left, chain = [len(each) for each in behind], list(duration_N)
    free = [task for task, count in enumerate(left) if not count]
    while free:
        task = free.pop()
        for need in needs_N[task]:
            chain[need] = max(chain[need], duration_N[need] + chain[task])
            left[need] -= 1
            if not left[need]:
                free.append(need)
    return [-length for length in chain]


def _behind(needs_N: Sequence[Sequence[int]]) -> list[list[int]]:
    behind: list[list[int]] = [[] for _ in needs_N]
    for task, needs in enumerate(needs_N):
        for need in needs:
            behind[need].append(task)
    return behind
