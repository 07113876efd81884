"""What a schedule of blocks chooses besides its orders, the graph that follows, and orders by rule."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from turnout.solve.list_schedule import list_schedule, urgency
from turnout.solve.slowed_timeline import slowed_timeline
from turnout.solve.timeline import ends
from turnout.types import BlockCosts, BlockSchedule, BlockTask
from turnout.types.block_schedule import RESOURCES

__all__ = ["DEGREES", "PIECES", "RULES", "Found", "Graph", "Shape", "best", "graph", "pieces"]

FORWARD = "AGDNEMC"  # in the order of the program
BACKWARD = ("C'", "M'", "E'", "Ex", "Ew", "N'", "D'", "G'", "A'", "Ax", "Aw", "Re", "Ra")
Orders = Sequence[Sequence[int]]
DEGREES = range(1, 17)  # pipeline degrees that published planners are tried with
PIECES = (1, 2, 3, 4, 6, 8, 12, 16)  # and into how many pieces the larger gradient is cut


@dataclasses.dataclass(frozen=True)
class Shape:
    """What is decided before orders are.

    Args:
        attention_chunks: parts of attention.
        expert_chunks: parts of the experts.
        pieces: in how many pieces the larger of the gradients is reduced.
        halve_attention: whether ``Ax`` and ``Aw`` are apart.
        halve_experts: whether ``Ex`` and ``Ew`` are.
        by_chunk: whether a chunk's backward pass begins before the others are through.
        window: the most chunks under way.
        fused: backward passes that are in one where the others are in halves.
        carry: the first block whose reductions run under the next step's forward pass; None where none does.

    Source: none; plain bookkeeping.
    """

    attention_chunks: int = 1
    expert_chunks: int = 1
    pieces: int = 1
    halve_attention: bool = False
    halve_experts: bool = False
    by_chunk: bool = False
    window: int | None = None
    carry: int | None = None
    fused: frozenset[BlockTask] = frozenset()


def pieces(size: int, largest: int, count: int) -> tuple[int, ...]:
    """The bytes of each piece, when ``count`` of them make up ``largest`` bytes; whole blocks of 512 but for the last.

    >>> pieces(1200, 2400, 4), pieces(0, 2400, 4)
    ((1024, 176), ())

    Source: Gao et al., 2025, "FlowMoE": pieces of S_p bytes.
    """
    if not size:
        return ()
    each = -(-math.ceil(largest / count) // 512) * 512
    whole = size // each
    return (each,) * whole + ((size - whole * each,) if size % each else ())


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """The tasks of a shape with what each takes, needs and occupies; ``blank`` is the schedule without its order.

    Source: none; plain bookkeeping.
    """

    blank: BlockSchedule
    tasks: tuple[BlockTask, ...]
    resource: list[int]
    needs: list[list[int]]
    lagged: list[list[tuple[int, float]]]
    behind: list[list[int]]
    seconds: list[float]
    slowed: tuple[tuple[float, ...], ...] | None

    @property
    def busiest(self) -> float:
        """How long the resource with most to do works: no orders are shorter."""
        total = [0.0, 0.0, 0.0]
        for resource, seconds in zip(self.resource, self.seconds, strict=True):
            total[resource] += seconds
        return max(total)

    def needed(self, task: int) -> bool:
        """Whether any other task needs this one."""
        return bool(self.behind[task])

    def by_rank(self, rank: Sequence[float]) -> Orders:
        """The orders of list scheduling with this rank."""
        return list_schedule(self.resource, self.seconds, self.needs, rank, self.behind)

    def makespan(self, orders: Orders) -> float:
        """How long these orders take; infinite where tasks wait for each other."""
        ended = ends(orders, self.seconds, self.lagged)
        if ended is None:
            return math.inf
        if self.slowed is not None:
            return slowed_timeline(orders, self.seconds, self.needs, self.slowed).makespan
        return max(ended)

    def schedule(self, orders: Orders, method: str) -> BlockSchedule:
        """The noun with these orders."""
        named = [tuple(self.tasks[task] for task in order) for order in orders] + [()] * (3 - len(orders))
        return dataclasses.replace(self.blank, compute=named[0], wire=named[1], inner=named[2], method=method)

    def rank(self, rule: str) -> list[float]:
        """The rank of each task by the rule of this name."""
        return RULES[rule](self)


class Found(NamedTuple):
    """Orders with how long they take, and what they are orders of.

    Source: none; plain bookkeeping.
    """

    seconds: float
    shape: Shape
    orders: Orders
    graph: Graph


def best(costs: BlockCosts, blocks: int, shapes: Iterable[Shape], rules: Sequence[str] = ("program",)) -> Found:
    """The shortest that list scheduling makes of these shapes with these rules.

    Source: Graham, 1966, "Bounds for certain multiprocessing anomalies".
    """
    found: Found | None = None
    for shape in shapes:
        made = graph(costs, blocks, shape)
        if found is not None and made.busiest >= found.seconds:
            continue  # whatever its orders
        for rule in rules:
            orders = made.by_rank(made.rank(rule))
            seconds = made.makespan(orders)
            if found is None or seconds < found.seconds:
                found = Found(seconds, shape, orders, made)
    assert found is not None
    return found


def graph(costs: BlockCosts, blocks: int, shape: Shape) -> Graph:
    """The graph of a shape of ``blocks`` blocks at these costs.

    Source: none; ``BlockSchedule.needs``, by number.
    """
    largest = max(costs.dense_bytes, costs.expert_bytes)
    sizes = [pieces(size, largest, shape.pieces) for size in (costs.dense_bytes, costs.expert_bytes)]
    blank, tasks, resource, needs, behind = _skeleton(shape, blocks, costs.two_wires, costs.cut, *sizes)
    once: dict[tuple[str, int], float] = {}
    for task in tasks:
        if (task.kind, task.chunk) not in once:
            once[task.kind, task.chunk] = costs.seconds(task, blank)
    seconds = [once[task.kind, task.chunk] for task in tasks]
    chip, wire = costs.compute_slowed, costs.wire_slowed
    slowed = ((0.0, chip, chip), (wire, 0.0, 0.0), (wire, 0.0, 0.0)) if chip or wire else None
    return Graph(blank, tasks, resource, needs, _lagged(needs), behind, seconds, slowed)


def _lagged(needs: list[list[int]]) -> list[list[tuple[int, float]]]:
    return [[(need, 0.0) for need in each] for each in needs]


@functools.lru_cache(maxsize=4096)
def _skeleton(
    shape: Shape, blocks: int, two: bool, cut: str, dense: tuple[int, ...], experts: tuple[int, ...]
) -> tuple[BlockSchedule, tuple[BlockTask, ...], list[int], list[list[int]], list[list[int]]]:
    """The part of a graph that does not depend on times; nobody may change it."""
    kinds = [*"AGDEC", "C'", "D'", "G'", "E'", "A'", *(("N", "M", "M'", "N'") if two else ())]
    counts = {kind: shape.attention_chunks if kind[0] in "AG" else shape.expert_chunks for kind in kinds}
    counts |= {"Re": len(experts), "Ra": len(dense)}
    place = {kind: number for number, kind in enumerate((*FORWARD, *BACKWARD))}
    every = [BlockTask(kind, block, i) for block in range(blocks) for kind, n in counts.items() for i in range(n)]
    backward = len(FORWARD)
    halved = {"E'": shape.halve_experts, "A'": shape.halve_attention}
    whole = [task for task in every if not halved.get(task.kind) or task in shape.fused]
    apart = [task for task in every if halved.get(task.kind) and task not in shape.fused]
    every = whole + [task._replace(kind=task.kind[0] + half) for task in apart for half in "xw"]
    every.sort(
        key=lambda task: (
            (0, task.block, place[task.kind], task.chunk)
            if place[task.kind] < backward
            else (1, -task.block, place[task.kind], -task.chunk if cut == "sequence" else task.chunk)
        )
    )
    on = [tuple(task for task in every if task.resource == resource) for resource in RESOURCES]
    blank = BlockSchedule(
        blocks,
        shape.attention_chunks,
        shape.expert_chunks,
        *on,
        dense_bytes=dense,
        expert_bytes=experts,
        cut="sequence" if cut == "sequence" else "batch",
        turn="chunk" if shape.by_chunk else "whole",
        window=shape.window,
        carried=tuple(task for task in every if shape.carry is not None and _carried(task, shape.carry)),
    )
    number, found = {task: at for at, task in enumerate(every)}, blank.needs()
    needs = [[number[one] for one in found[task]] for task in every]
    behind: list[list[int]] = [[] for _ in every]
    for at, each in enumerate(needs):
        for need in each:
            behind[need].append(at)
    return blank, tuple(every), [RESOURCES.index(task.resource) for task in every], needs, behind


def _carried(task: BlockTask, first: int) -> bool:
    return task.kind in ("Ra", "Re") and task.block >= first


# ---- rules: what goes first when several tasks are ready; reductions never go before an all-to-all


def _program(graph: Graph) -> list[float]:
    """As the program would have them: block by block, each kind for all chunks; reductions when nothing else wants."""
    late = [1e6 if task.kind in ("Ra", "Re") and not graph.needed(at) else 0.0 for at, task in enumerate(graph.tasks)]
    return [at + more for at, more in enumerate(late)]


def _chain(graph: Graph) -> list[float]:
    """The longest chain of work first."""
    return urgency(graph.seconds, graph.needs)


def _chain_late(graph: Graph) -> list[float]:
    """The longest chain first, weight gradients and reductions only when nothing else is ready."""
    late = {"Ew": 1e6, "Aw": 1e6, "Ra": 2e6, "Re": 2e6}
    rank = _chain(graph)
    return [
        rank[at] + (0.0 if task.kind[0] == "R" and graph.needed(at) else late.get(task.kind, 0.0))
        for at, task in enumerate(graph.tasks)
    ]


def _deep(graph: Graph) -> list[float]:
    """The first chunk as far as it goes, and what is left of the others behind it."""
    width = len(graph.tasks)
    return [task.chunk * width + rank for rank, task in zip(_program(graph), graph.tasks, strict=True)]


RULES: Mapping[str, Callable[[Graph], list[float]]] = {
    "program": _program,
    "chain": _chain,
    "chain late": _chain_late,
    "deep": _deep,
}
