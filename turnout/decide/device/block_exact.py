"""The shortest orders of a small schedule of blocks, with the proof: branch and bound."""

import dataclasses
from collections.abc import Sequence

from turnout.decide.device.block_orders import Found, Graph

__all__ = ["Exact", "exact"]

_CLOSE = 1e-12
_LONGEST = 700  # tasks: each is one call deeper


@dataclasses.dataclass(frozen=True)
class Exact:
    """The shortest that was found, and whether nothing is shorter.

    Source: none; plain bookkeeping.
    """

    found: Found
    proved: bool
    nodes: int


def exact(start: Found, *, below: float | None = None, most_nodes: int = 200_000) -> Exact:
    """The shortest orders of the same graph, begun with orders that are good already.

    Only schedules are looked at in which no task could end before another one of its resource begins (active ones).
    Chunks are alike, so the first of a kind is chunk 0, the next chunk 1, and so on: in any schedule their names can be
    changed so. What is done, with when its resources are free and what is still needed of it ended, is looked at once.

    Args:
        start: orders of a graph with as many chunks of attention as of experts, all of the same size.
        below: only orders shorter than this are looked for; None for shorter than ``start``.
        most_nodes: after so many partial schedules it ends without the proof. With more than 700 tasks it does not
            begin.

    Returns:
        The shortest orders found and whether they are proved to be.

    Source: Giffler and Thompson, 1960, "Algorithms for solving production-scheduling problems".
    """
    if len(start.graph.tasks) > _LONGEST:
        return Exact(start, False, 0)
    search = _Search(start.graph, start.seconds if below is None else min(below, start.seconds), most_nodes)
    search.run()
    found = start
    if search.sequence is not None:
        orders: list[list[int]] = [[] for _ in range(search.machines)]
        for task in search.sequence:
            orders[start.graph.resource[task]].append(task)
        found = start._replace(seconds=start.graph.makespan(orders), orders=orders)
    # What is shortest alone need not be where chip and wires slow each other down.
    proved = not search.given_up and start.graph.slowed is None
    return Exact(min(found, start, key=lambda one: one.seconds), proved, search.nodes)


class _Search:
    """Depth first, the most urgent first."""

    def __init__(self, graph: Graph, shortest: float, most_nodes: int) -> None:
        self.graph, self.shortest, self.most_nodes = graph, shortest, most_nodes
        self.machines = max(graph.resource) + 1
        self.nodes, self.given_up = 0, False
        self.sequence: list[int] | None = None
        self.tail = [-rank - seconds for rank, seconds in zip(graph.rank("chain"), graph.seconds, strict=True)]
        kinds: dict[tuple[str, int], list[int]] = {}
        for at, task in enumerate(graph.tasks):
            kinds.setdefault((task.kind, task.block), []).append(at)
        self.lines = list(kinds.values())  # each in the order of the program
        self.seen: dict[tuple[int, ...], list[list[float]]] = {}
        # Of each task, how many of those that it needs and of those that need it are not in their place yet.
        self.missing = [len(needs) for needs in graph.needs]
        self.wanted = [len(behind) for behind in graph.behind]
        self.waited: set[int] = set()  # in their place, and needed by one that is not

    def run(self) -> None:
        """Looks at everything, or gives up."""
        left = [0.0] * self.machines
        for task, resource in enumerate(self.graph.resource):
            left[resource] += self.graph.seconds[task]
        self._descend([0] * len(self.lines), {}, [0.0] * self.machines, left, [])

    def _descend(
        self, place: list[int], end: dict[int, float], free: list[float], left: list[float], done: list[int]
    ) -> None:
        self.nodes += 1
        if self.nodes > self.most_nodes:
            self.given_up = True
            return
        if len(done) == len(self.graph.tasks):
            if max(free) < self.shortest - _CLOSE:
                self.shortest, self.sequence = max(free), list(done)
            return
        ready = self._ready(place, end, free)
        if self._hopeless(ready, free, left) or self._dominated(place, end, free):
            return
        seconds, resource = self.graph.seconds, self.graph.resource
        first = min(ready, key=lambda one: one[0] + seconds[one[1]])
        machine, soonest = resource[first[1]], first[0] + seconds[first[1]]
        # The first too if it takes no time, and so does not begin before it ends.
        own = [one for one in ready if resource[one[1]] == machine]
        branches = [one for one in own if one is first or one[0] < soonest - _CLOSE]
        for start, task, line in sorted(branches, key=lambda one: -self.tail[one[1]]):
            before = free[machine]
            end[task] = free[machine] = start + seconds[task]
            left[machine] -= seconds[task]
            place[line] += 1
            done.append(task)
            self._put(task)
            self._descend(place, end, free, left, done)
            self._take_back(task)
            done.pop()
            place[line] -= 1
            left[machine] += seconds[task]
            free[machine] = before
            del end[task]

    def _put(self, task: int) -> None:
        for then in self.graph.behind[task]:
            self.missing[then] -= 1
        if self.wanted[task]:
            self.waited.add(task)
        for need in self.graph.needs[task]:
            self.wanted[need] -= 1
            if not self.wanted[need]:
                self.waited.discard(need)

    def _take_back(self, task: int) -> None:
        for need in self.graph.needs[task]:
            self.wanted[need] += 1
            self.waited.add(need)
        self.waited.discard(task)
        for then in self.graph.behind[task]:
            self.missing[then] += 1

    def _ready(self, place: list[int], end: dict[int, float], free: list[float]) -> list[tuple[float, int, int]]:
        """When the next chunk of each kind can start, if what it needs has its place."""
        ready = []
        for line, tasks in enumerate(self.lines):
            if place[line] < len(tasks):
                task = tasks[place[line]]
                if not self.missing[task]:
                    start = free[self.graph.resource[task]]
                    for need in self.graph.needs[task]:
                        start = max(start, end[need])
                    ready.append((start, task, line))
        return ready

    def _hopeless(self, ready: Sequence[tuple[float, int, int]], free: list[float], left: list[float]) -> bool:
        """Whether what is left cannot be shorter than the shortest, by its longest chain or its busiest resource."""
        limit = self.shortest - _CLOSE
        if any(start + self.graph.seconds[task] + self.tail[task] >= limit for start, task, _ in ready):
            return True
        return any(free[machine] + left[machine] >= limit for machine in range(self.machines))

    def _dominated(self, place: list[int], end: dict[int, float], free: list[float]) -> bool:
        """Whether the same tasks have been done before with nothing later."""
        here, key = [*free, *(end[task] for task in sorted(self.waited))], tuple(place)
        known = self.seen.setdefault(key, [])
        if any(all(a <= b + _CLOSE for a, b in zip(other, here, strict=True)) for other in known):
            return True
        known[:] = [other for other in known if not all(a <= b for a, b in zip(here, other, strict=True))]
        known.append(here)
        return False
