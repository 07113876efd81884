"""Search from a schedule of blocks to a shorter one: over its shape, its ranks, and its orders."""

import dataclasses
import itertools
import math
import random
from collections.abc import Collection, Iterable, Iterator, Sequence

from turnout.decide.device.block_exact import exact
from turnout.decide.device.block_orders import RULES, Found, Graph, Shape, best, graph
from turnout.solve.timeline import ends
from turnout.types import BlockCosts, BlockTask

__all__ = ["by_fusing", "by_orders", "by_ranks", "by_shape"]


def by_shape(
    costs: BlockCosts,
    blocks: int,
    start: Shape,
    *,
    most_alive: float,
    carry: bool = False,
    without: Collection[str] = (),
) -> list[Found]:
    """List scheduling of shapes around one, a choice at a time for as long as that helps; the shortest first.

    ``without`` leaves choices alone: ``turn``, ``halves``, ``unequal``.

    Source: none; coordinate descent with every rule at each.
    """
    found: dict[Shape, Found] = {}

    def tried(shapes: Iterable[Shape]) -> Found:
        for each in shapes:
            fits = max(each.attention_chunks, each.expert_chunks) <= costs.most_chunks
            shape = _windowed(each, blocks, most_alive)
            fits = fits and ("unequal" not in without or each.attention_chunks == each.expert_chunks)
            if fits and shape is not None and shape not in found:
                found[shape] = best(costs, blocks, [shape], tuple(RULES))
        return min(found.values(), key=lambda one: one.seconds)

    halves = list(itertools.product((False,) if "halves" in without else (False, True), repeat=2))
    turns = (False, True) if costs.sums and "turn" not in without else (False,)
    flags = [{"halve_attention": a, "halve_experts": e, "by_chunk": k} for a, e in halves for k in turns]
    if not found and most_alive < blocks:
        tried(Shape(n, n, start.pieces, by_chunk=True) for n in range(1, costs.most_chunks + 1))
    even = dataclasses.replace(start, attention_chunks=start.expert_chunks)
    now, before = tried([start, even]), math.inf
    while now.seconds < before:
        before = now.seconds
        now = tried(dataclasses.replace(now.shape, window=None, **flag) for flag in flags)
        now = tried(_degrees(now.shape))
        now = tried(dataclasses.replace(now.shape, window=None, pieces=n) for n in _near(now.shape.pieces))
        if carry:
            now = tried(dataclasses.replace(now.shape, window=None, carry=n) for n in (*range(1, blocks), None))
    return sorted(found.values(), key=lambda one: one.seconds)


def _near(count: int) -> list[int]:
    return [n for n in (count // 2, count - 1, count + 1, 2 * count) if n >= 1]


def _degrees(shape: Shape) -> Iterator[Shape]:
    a, e = shape.attention_chunks, shape.expert_chunks
    pairs = {(a + i, e + j) for i in (-1, 0, 1) for j in (-1, 0, 1)} | {(a, 2 * a), (e, e), (a, a), (2 * e, e)}
    for n, m in sorted(pairs):
        if n >= 1 and m >= 1:
            yield dataclasses.replace(shape, attention_chunks=n, expert_chunks=m, window=None)


def _windowed(shape: Shape, blocks: int, most_alive: float) -> Shape | None:
    """The shape with as many chunks under way as may be; None where it cannot be kept to."""
    if most_alive >= blocks:
        return shape
    window = math.floor(most_alive * shape.attention_chunks / blocks + 1e-9)
    if window < 1 or not shape.by_chunk or shape.attention_chunks != shape.expert_chunks:
        return None
    return dataclasses.replace(shape, window=window if window < shape.attention_chunks else None)


def by_ranks(found: Found, *, tries: int, chance: random.Random) -> Found:
    """The same shape with ranks pushed about at random, of one task or of all of a kind; what is no worse is kept.

    Source: Bean, 1994, "Genetic algorithms and random keys"; here one of them, climbing.
    """
    made, width = found.graph, len(found.graph.tasks)
    groups: dict[object, list[int]] = {}
    for at, task in enumerate(made.tasks):
        for key in ((task.kind, task.block), task.kind, at):
            groups.setdefault(key, []).append(at)
    moved, rank, shortest = list(groups.values()), _rank_of(found), found
    for _ in range(tries):
        trial = rank[:]
        for _ in range(chance.choice((1, 1, 2, 4))):
            push = chance.gauss(0.0, width * chance.choice((0.02, 0.1, 0.3)))
            for at in chance.choice(moved):
                trial[at] += push
        orders = made.by_rank(trial)
        seconds = made.makespan(orders)
        if seconds <= shortest.seconds:
            rank, shortest = trial, found._replace(seconds=seconds, orders=orders)
    return shortest


def _rank_of(found: Found) -> list[float]:
    """Ranks with which list scheduling gives these orders, or nearly: when each task starts."""
    made = found.graph
    ended = ends(found.orders, made.seconds, made.lagged)
    assert ended is not None
    order = sorted(range(len(ended)), key=lambda task: (ended[task] - made.seconds[task], task))
    rank = [0.0] * len(ended)
    for place, task in enumerate(order):
        rank[task] = float(place)
    return rank


def by_orders(found: Found, *, tries: int, chance: random.Random) -> Found:
    """The same shape with tasks of the longest chain moved before their neighbours on a resource.

    A move that is worse is sometimes kept, ever less often.

    Source: Nowicki and Smutnicki, 1996, "A fast taboo search algorithm for the job shop": only moves on the longest
        chain can help; van Laarhoven et al., 1992, "Job shop scheduling by simulated annealing".
    """
    made, orders = found.graph, [list(order) for order in found.orders]
    now, shortest = found.seconds, found
    for turn in range(tries):
        pairs = _on_the_chain(made, orders, chance)
        if not pairs:
            break
        first, then = chance.choice(pairs)
        resource = made.resource[first]
        order = orders[resource]
        at, to = order.index(then), order.index(first)
        to = max(0, to - chance.choice((0, 0, 1, 2, 3)))
        orders[resource] = [*order[:to], then, *order[to:at], *order[at + 1 :]]
        seconds = made.makespan(orders)
        warmth = 0.003 * now * (1 - turn / tries)
        if seconds <= now or chance.random() < math.exp((now - seconds) / (warmth + 1e-30)):
            now = seconds
            if seconds < shortest.seconds:
                shortest = found._replace(seconds=seconds, orders=[list(order) for order in orders])
        else:
            orders[resource] = order
    return shortest


def by_fusing(costs: BlockCosts, blocks: int, found: Found) -> Found:
    """The same with the halves of a backward pass in one again: of a kind and block, or a single pair, if that helps.

    Source: none; a task that starts once in place of twice.
    """
    halves = [task for task in found.graph.tasks if task.kind in ("Ex", "Ax")]
    groups: dict[object, list[BlockTask]] = {}
    for task in halves:
        groups.setdefault((task.kind, task.block), []).append(task._replace(kind=task.kind[0] + "'"))
    groups |= {task: [task._replace(kind=task.kind[0] + "'")] for task in halves}
    for group in groups.values():
        if found.shape.fused.issuperset(group):
            continue
        shape = dataclasses.replace(found.shape, fused=found.shape.fused.union(group))
        made = graph(costs, blocks, shape)
        trial = Found(made.makespan(orders := _without(found, made)), shape, orders, made)
        trial = exact(trial, below=found.seconds, most_nodes=200).found
        if trial.seconds <= found.seconds:
            found = trial
    return found


def _without(found: Found, made: Graph) -> list[list[int]]:
    """The orders of ``found`` for a graph that has some of its halves in one, in the place of the first half."""
    number = {task: at for at, task in enumerate(made.tasks)}
    orders = []
    for order in found.orders:
        tasks = [found.graph.tasks[at] for at in order]
        whole = [task if task in number else task._replace(kind=task.kind[0] + "'") for task in tasks]
        orders.append(list(dict.fromkeys(number[task] for task in whole)))
    return orders


def _on_the_chain(made: Graph, orders: Sequence[Sequence[int]], chance: random.Random) -> list[tuple[int, int]]:
    """Neighbours on a resource that the longest chain passes through one after the other, free to change places."""
    end = ends(orders, made.seconds, made.lagged)
    assert end is not None
    before = {then: first for order in orders for first, then in itertools.pairwise(order)}
    task, pairs = max(range(len(end)), key=end.__getitem__), []
    while True:
        start = end[task] - made.seconds[task]
        close = 1e-9 * (1e-9 + abs(start))
        reason = [need for need in made.needs[task] if abs(end[need] - start) <= close]
        neighbour = before.get(task)
        if neighbour is not None and abs(end[neighbour] - start) <= close and neighbour not in made.needs[task]:
            pairs.append((neighbour, task))
            if not reason or chance.random() < 0.5:
                reason = [neighbour]
        if not reason:
            return pairs
        task = reason[0]
