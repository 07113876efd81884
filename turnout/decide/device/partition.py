"""Partition: which blocks of a network each pipeline stage has, by the simulated step."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence

from turnout.errors import UsageError, word
from turnout.solve.pipeline import pipeline
from turnout.types.schedule import Schedule
from turnout.types.stage_costs import StageCosts

__all__ = ["Partition", "partition"]

_WHERE = "turnout.decide.device.partition"
_SLACK = 1e-12


@dataclasses.dataclass(frozen=True)
class Partition:
    """How many blocks each stage has, and what a step takes.

    Args:
        blocks_S: for each stage its blocks, in order.
        costs: of these stages.
        time: the simulated makespan.
        even_time: that of stages with equally many blocks.
        min_max_time: that of stages whose largest is as small as can be.

    >>> head = (1.0, 1.0, 1.0, 3.0)
    >>> cut = partition(StageCosts(head, head, head), _two())
    >>> cut.blocks_S, cut.time, cut.even_time
    ((3, 1), 27.0, 30.0)

    Source: none; plain bookkeeping.
    """

    blocks_S: tuple[int, ...]
    costs: StageCosts
    time: float
    even_time: float
    min_max_time: float


def partition(blocks: StageCosts, schedule: Schedule, *, memory: float | None = None, tries: int = 400) -> Partition:
    """Cuts a network of L blocks into a schedule's S stages so that a step is short.

    The largest stage is made as small as can be by a dynamic program, which is not what a step takes: it is the start,
    beside equally many blocks, of moves of one block, or of two, over a boundary while the simulated makespan falls.

    Args:
        blocks: the costs of every block, as if each were a stage; an embedding or a head is a block.
        schedule: of S stages, whose order stays as it is.
        memory: the most that activations and gathered parameters of a device may hold; None for any.
        tries: how many partitions may be played at most.

    Returns:
        The partition.

    Raises:
        UsageError: fewer blocks than stages, or none that was tried fits the memory.

    >>> partition(StageCosts.even(4), _two()).blocks_S
    (2, 2)

    Source: Narayanan et al., 2019, "PipeDream", for the dynamic program; the simulated makespan as the aim is ours.
    """
    count, stages = blocks.stages, schedule.stages
    if count < stages:
        fix = f"take a schedule of at most {count} stages"
        raise UsageError(word("blocks", got=count, allowed=f"be at least the {stages} stages", where=_WHERE, fix=fix))
    seen: dict[tuple[int, ...], float] = {}

    def play(cuts: tuple[int, ...]) -> float:
        if cuts not in seen:
            times = pipeline(schedule, merged(blocks, cuts))
            fits = memory is None or float(times.peak_R.max()) <= memory + 1e-9
            seen[cuts] = times.makespan if fits else float("inf")
        return seen[cuts]

    small, more = divmod(count, stages)
    even = tuple(small + (stage < more) for stage in range(stages))
    work = [sum(one) for one in zip(blocks.forward_S, blocks.input_S, blocks.weight_S, strict=True)]
    balanced = _min_max(work, stages)
    starts = {even: play(even), balanced: play(balanced)}
    limits = [tries * (place + 1) // len(starts) for place in range(len(starts))]
    climbed = [_climb(cuts, limit, play, seen) for cuts, limit in zip(starts, limits, strict=True)]
    best = min(climbed, key=play)
    if play(best) == float("inf"):
        got, fix = f"memory {memory:g}", "raise it, or take a schedule that holds fewer microbatches"
        allowed = "be enough for the partitions near the balanced one"
        raise UsageError(word("memory", got=got, allowed=allowed, where=_WHERE, fix=fix))
    free = {cuts: pipeline(schedule, merged(blocks, cuts)).makespan for cuts in starts}
    return Partition(best, merged(blocks, best), play(best), free[even], free[balanced])


def merged(blocks: StageCosts, blocks_S: Sequence[int]) -> StageCosts:
    """The costs of stages of so many blocks each."""
    ends = list(itertools.accumulate(blocks_S, initial=0))

    def sums(value: Sequence[float]) -> tuple[float, ...]:
        return tuple(sum(value[a:b]) for a, b in itertools.pairwise(ends))

    return dataclasses.replace(
        blocks,
        forward_S=sums(blocks.forward_S),
        input_S=sums(blocks.input_S),
        weight_S=sums(blocks.weight_S),
        activation_S=sums(blocks.held_S),
        gather_S=None if blocks.gather_S is None else sums(blocks.gather_S),
        parameters_S=None if blocks.parameters_S is None else sums(blocks.parameters_S),
    )


def _min_max(work: Sequence[float], stages: int) -> tuple[int, ...]:
    """The numbers of consecutive blocks whose largest sum is least; no stage is empty."""
    total = list(itertools.accumulate(work, initial=0.0))
    count = len(work)
    least = [[float("inf")] * (count + 1) for _ in range(stages + 1)]
    cut = [[0] * (count + 1) for _ in range(stages + 1)]
    least[0][0] = 0.0
    for stage in range(1, stages + 1):
        for end in range(stage, count + 1):
            for begin in range(stage - 1, end):
                largest = max(least[stage - 1][begin], total[end] - total[begin])
                if largest < least[stage][end] - _SLACK:
                    least[stage][end], cut[stage][end] = largest, begin
    sizes, end = [], count
    for stage in range(stages, 0, -1):
        sizes.append(end - cut[stage][end])
        end = cut[stage][end]
    return tuple(reversed(sizes))


def _climb(
    cuts: tuple[int, ...],
    tries: int,
    play: Callable[[tuple[int, ...]], float],
    seen: Mapping[tuple[int, ...], float],
) -> tuple[int, ...]:
    """Moves one or two blocks from any stage to any other, all between shifting by as many, while that helps."""
    now = play(cuts)
    while len(seen) < tries:
        better = None
        near = sorted(itertools.permutations(range(len(cuts)), 2), key=lambda pair: abs(pair[0] - pair[1]))
        for (source, target), many in itertools.product(near, (1, 2)):
            if len(seen) >= tries:
                break
            if cuts[source] <= many:
                continue
            moved = list(cuts)
            moved[source] -= many
            moved[target] += many
            time = play(tuple(moved))
            if time < now - _SLACK:
                better, now = tuple(moved), time
                break
        if better is None:
            break
        cuts = better
    return cuts


def _two() -> Schedule:
    """A schedule of two stages, for the examples."""
    return Schedule.from_csv("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n", name="two")
