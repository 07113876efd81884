"""block_schedule: one schedule for all that sparse transformer blocks do on the chip and on the wires."""

import random
from collections.abc import Callable, Collection, Mapping

from turnout.decide.device.block_exact import exact
from turnout.decide.device.block_orders import RULES, Found, Shape, best, graph
from turnout.decide.device.block_search import by_fusing, by_orders, by_ranks, by_shape
from turnout.decide.device.flowmoe import flowmoe
from turnout.decide.device.fsmoe import fsmoe
from turnout.decide.device.tutel import tutel
from turnout.decide.device.unoverlapped import reduced_last, unoverlapped
from turnout.errors import UsageError, nearest, word
from turnout.types import BlockCosts, BlockSchedule

__all__ = ["CHOICES", "METHODS", "block_schedule"]

_WHERE = "turnout.decide.device.block_schedule"
PUBLISHED: Mapping[str, Callable[[BlockCosts, int], Found]] = {
    "none": unoverlapped,
    "tutel": tutel,
    "fsmoe": fsmoe,
    "flowmoe": flowmoe,
}
METHODS = (*PUBLISHED, "turnout")
CHOICES = ("turn", "halves", "unequal")
_SCREENED = 6  # blocks at most that shapes are chosen on; more blocks repeat what is best for these
# How many shapes go into each round of the search, and how often each is tried in it: list scheduling alone says too
# little of how short a shape can become. Tasks are counted so that a long schedule is searched for no longer.
_ROUNDS = ((30, 20), (10, 60), (3, 200))
_USUAL = 150


def block_schedule(
    costs: BlockCosts,
    *,
    blocks: int,
    method: str = "turnout",
    memory_blocks: float | None = None,
    carry: bool = False,
    without: Collection[str] = (),
    seed: int = 0,
) -> BlockSchedule:
    """How many chunks, how large a piece of a gradient, and the order of everything, so that a step is short.

    ``turnout`` begins with what the published methods find, goes on through unequal chunks of attention and experts,
    halves of backward passes, the turn by chunk and sizes of pieces by list scheduling, then pushes ranks and moves
    tasks of the longest chain about. So it is never longer than the shortest of them, as the simulator has it.

    Args:
        costs: what every kind of task takes, profiled.
        blocks: alike blocks one after the other, L.
        method: ``turnout``; or what the same parts give of ``none`` (no overlap), ``tutel``, ``fsmoe``, ``flowmoe``.
        memory_blocks: the most that may be kept for the backward pass at once, in blocks' activations of the whole
            batch; None for all L. Below L, chunks go forward and back before others begin; only ``turnout`` can.
        carry: whether reductions may run under the next step's forward pass; not where anything needs all gradients
            at once, such as clipping by their norm. Only ``turnout`` uses it.
        without: what ``turnout`` is not to use: ``turn`` (a chunk's backward pass before the others are through),
            ``halves`` (input and weight gradients apart, which compiled code cannot do), ``unequal`` (other chunks
            of attention than of experts).
        seed: of the search.

    Returns:
        The schedule, checked.

    Raises:
        UnknownNameError: no such method, or nothing of the kind to be without.
        UsageError: fewer than one block, or activations that do not fit however many chunks there are.

    >>> costs = BlockCosts.even(attention=1.0, experts=1.0, dispatch=0.5, reduce=0.3, start=0.01)
    >>> plan = block_schedule(costs, blocks=1, method="flowmoe")
    >>> plan.attention_chunks, plan.expert_chunks, len(plan.dense_bytes)
    (6, 6, 1)

    Source: Gao et al., 2025, "FlowMoE"; Hwang et al., 2023, "Tutel"; Pan et al., 2025, "FSMoE". What begins with theirs
        and goes on is ours.
    """
    for kind, names, known in (("method", (method,), METHODS), ("choice", without, CHOICES)):
        for name in names:
            if name not in known:
                raise nearest(name, known, kind=kind, where=_WHERE)
    alive = blocks if memory_blocks is None else memory_blocks
    _check_fits(costs, blocks, alive, method, without)
    if method == "turnout":
        # Without carrying too, so that being allowed to never makes it longer.
        ways = (False, True) if carry else (False,)
        found = min((_search(costs, blocks, alive, way, without, random.Random(seed)) for way in ways), key=_seconds)
    else:
        found = _published(costs, blocks, method)
    made = found.graph.schedule(found.orders, method)
    made.check()
    return made


def _seconds(found: Found) -> float:
    return found.seconds


def _check_fits(costs: BlockCosts, blocks: int, alive: float, method: str, without: Collection[str]) -> None:
    if not isinstance(blocks, int) or blocks < 1:
        allowed = "be a whole number of at least 1"
        raise UsageError(word("blocks", got=blocks, allowed=allowed, where=_WHERE, fix="pass blocks=1"))
    if alive >= blocks:
        return
    if "turn" in without:
        allowed = f"be {blocks} without 'turn', which is what lets chunks go back before others begin"
        raise UsageError(word("memory_blocks", got=alive, allowed=allowed, where=_WHERE, fix="leave 'turn' in"))
    fix = "pass memory_blocks=None"
    if method != "turnout":
        allowed = f"be {blocks} with method {method!r}, which keeps all until the backward pass"
        raise UsageError(word("memory_blocks", got=alive, allowed=allowed, where=_WHERE, fix="pass method='turnout'"))
    if costs.cut == "sequence" or not costs.sums:
        allowed = f"be {blocks} where chunks meet in attention or in the loss"
        raise UsageError(word("memory_blocks", got=alive, allowed=allowed, where=_WHERE, fix=fix))
    least = blocks / costs.most_chunks
    if alive < least:
        allowed = f"be at least {least:.3g}: one of {costs.most_chunks} chunks in {blocks} blocks"
        fix = f"pass memory_blocks={least:.3g}, or let the batch be cut into more chunks"
        raise UsageError(word("memory_blocks", got=alive, allowed=allowed, where=_WHERE, fix=fix))


def _published(costs: BlockCosts, blocks: int, method: str) -> Found:
    """What a published method finds; for many blocks, what it finds for a few, at all of them."""
    found = PUBLISHED[method](costs, min(blocks, _SCREENED))
    if blocks <= _SCREENED:
        return found
    whole = graph(costs, blocks, found.shape)
    last, gaps = reduced_last(whole, found.shape), best(costs, blocks, [found.shape])
    return last if method in ("none", "tutel") else min(last, gaps, key=lambda one: one.seconds)


def _search(
    costs: BlockCosts, blocks: int, alive: float, carry: bool, without: Collection[str], chance: random.Random
) -> Found:
    few = min(blocks, _SCREENED)
    known = [] if alive < blocks else [_published(costs, blocks, method) for method in PUBLISHED]
    if "unequal" in without:
        known = [one for one in known if one.shape.attention_chunks == one.shape.expert_chunks]
    start = min(known, key=lambda one: one.seconds).shape if known else Shape(by_chunk=True)
    near = by_shape(costs, few, start, most_alive=alive * few / blocks, carry=carry, without=without)
    if few < blocks:
        near = [best(costs, blocks, [one.shape], tuple(RULES)) for one in near[: _ROUNDS[1][0]]]
    shortest = min(*near, *known, key=lambda one: one.seconds)
    for many, tries in _ROUNDS:
        better = []
        for one in near[:many]:
            pushed = by_ranks(one, tries=_often(one, tries), chance=chance)
            proved = exact(pushed, below=shortest.seconds, most_nodes=_often(one, 10 * tries)).found
            shortest = min(shortest, proved, key=lambda each: each.seconds)
            better.append(proved)
        near = sorted(better, key=lambda one: one.seconds)
    found = [by_fusing(costs, blocks, one) for one in near]
    found = [by_orders(one, tries=_often(one, 300), chance=chance) for one in found]
    return min(*found, shortest, key=lambda one: one.seconds)


def _often(found: Found, tries: int) -> int:
    """How often a search plays this one; resources that slow each other down take longer to play."""
    return max(1, round(tries * min(1.0, _USUAL / len(found.graph.tasks)) / (4 if found.graph.slowed else 1)))
