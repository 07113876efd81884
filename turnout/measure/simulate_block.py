"""simulate_block: when everything of a block schedule runs, and how much of the wire's work is hidden."""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping

from turnout.expects import expects
from turnout.solve.slowed_timeline import slowed_timeline
from turnout.solve.timeline import timeline
from turnout.types import BlockCosts, BlockSchedule, BlockTask

__all__ = ["BlockTimes", "simulate_block"]

Span = tuple[BlockTask, float, float]
_STEPS = 3  # of training in a row, when some of one runs under the next; the last shows what a step adds


@dataclasses.dataclass(frozen=True)
class BlockTimes:
    """When each task of one step runs, in seconds from its beginning.

    Args:
        spans: each task with its start and end, in the order of the start.
        period_s: what one more step adds to many: the makespan, or less where reductions are carried.
        bound_s: what no schedule can be below: the busiest resource without a gap, each kind of task started once.
        peak_blocks: the most that is kept for the backward pass, in blocks' activations of the whole batch.

    >>> spans = (BlockTask("A", 0, 0), 0.0, 2.0), (BlockTask("D", 0, 0), 1.0, 3.0)
    >>> times = BlockTimes(spans, period_s=3.0, bound_s=2.0, peak_blocks=0.5)
    >>> times.exposed_s, times.hidden, times.busy_s
    (1.0, 0.5, {'compute': 2.0, 'wire': 2.0})

    Source: none; plain bookkeeping.
    """

    spans: tuple[Span, ...]
    period_s: float
    bound_s: float
    peak_blocks: float

    @property
    def makespan_s(self) -> float:
        """How long the step takes."""
        return max((end for _, _, end in self.spans), default=0.0)

    @property
    def rows(self) -> Mapping[str, tuple[Span, ...]]:
        """The spans by resource, for a picture."""
        names = dict.fromkeys(task.resource for task, _, _ in sorted(self.spans, key=_resource))
        return {name: tuple(span for span in self.spans if span[0].resource == name) for name in names}

    @property
    def busy_s(self) -> Mapping[str, float]:
        """How long each resource works."""
        return {name: sum(end - start for _, start, end in spans) for name, spans in self.rows.items()}

    @property
    def wire_s(self) -> float:
        """How long any wire works."""
        return _length(_union(_wires(self.spans)))

    @property
    def exposed_s(self) -> float:
        """How long a wire works while the chip has nothing to do."""
        chip = [(start, end) for task, start, end in self.spans if task.resource == "compute"]
        both = _union([*_wires(self.spans), *chip])
        return _length(both) - _length(_union(chip))

    @property
    def hidden(self) -> float:
        """The share of the wire's work that runs under the chip's; 1 where there is none."""
        return 1 - self.exposed_s / self.wire_s if self.wire_s else 1.0

    def __str__(self) -> str:
        busy = ", ".join(f"{name} {seconds / self.makespan_s:.0%} busy" for name, seconds in self.busy_s.items())
        return (
            f"{self.makespan_s * 1e3:.4g} ms a step, {self.makespan_s / self.bound_s - 1:.1%} above the bound; {busy}; "
            f"{self.hidden:.0%} of the wire's work hidden"
        )


@expects(schedule=BlockSchedule, costs=BlockCosts)
def simulate_block(schedule: BlockSchedule, costs: BlockCosts) -> BlockTimes:
    """Plays a schedule at these costs: every resource its tasks in order, each as soon as what it needs is done.

    Where chip and wires slow each other down (``compute_slowed``, ``wire_slowed``), as long as both are busy.

    Args:
        schedule: the orders.
        costs: what each kind of task takes.

    Returns:
        When everything runs.

    Raises:
        UsageError: a schedule that is not right.

    >>> names = "A0.0 G0.0 E0.0 E'0.0 G'0.0 A'0.0", "D0.0 C0.0 C'0.0 D'0.0 Ra0.0"
    >>> chip, wire = (tuple(BlockTask.parse(name) for name in line.split()) for line in names)
    >>> costs = BlockCosts.even(attention=1.0, experts=1.0, dispatch=0.5, reduce=0.5)
    >>> times = simulate_block(BlockSchedule(1, 1, 1, chip, wire, dense_bytes=(1 << 20,)), costs)
    >>> times.makespan_s, times.bound_s, times.exposed_s
    (8.5, 6.0, 2.5)

    Source: Kelley and Walker, 1959, "Critical-Path Planning and Scheduling". Finer than by
    chunks, by tiles, is Zhang et al., 2025, "Comet": its claim has a simulator of its own.
    """
    schedule.check()
    spans = _play(schedule, costs, steps=1)
    period = max(end for _, _, end in spans)
    if schedule.carried:
        ends = [max(end for _, _, end in _play(schedule, costs, steps=n)) for n in (_STEPS - 1, _STEPS)]
        period = ends[1] - ends[0]
    return BlockTimes(tuple(spans), period, costs.bound_s(schedule.blocks), _peak(schedule, costs, spans))


def _play(schedule: BlockSchedule, costs: BlockCosts, steps: int) -> list[Span]:
    """The spans of so many steps, one after the other without a break but what parameters wait for."""
    tasks, needs = schedule.tasks, schedule.needs()
    number = {(step, task): step * len(tasks) + at for step in range(steps) for at, task in enumerate(tasks)}
    waits: list[list[int]] = []
    for step, task in itertools.product(range(steps), tasks):
        found = [number[step, one] for one in needs[task]]
        if step and task in schedule.carried:
            found += [number[step - 1, one] for one in _weights(task, tasks)]
        elif step and task.kind == "A":
            reductions = (one for one in tasks if one.kind in ("Ra", "Re") and one.block == task.block)
            found += [number[step - 1, one] for one in reductions if one not in schedule.carried]
        waits.append(found)
    seconds = [costs.seconds(task, schedule) for task in tasks] * steps
    orders = [[number[step, one] for step in range(steps) for one in order] for order in schedule.order.values()]
    chip, wire = costs.compute_slowed, costs.wire_slowed
    if chip or wire:
        played = slowed_timeline(orders, seconds, waits, ((0, chip, chip), (wire, 0, 0), (wire, 0, 0)))
    else:
        played = timeline(orders, seconds, [[(need, 0.0) for need in each] for each in waits])
    every = zip(tasks * steps, played.start_N.tolist(), played.end_N.tolist(), strict=True)
    return sorted(every, key=lambda span: span[1:])


def _weights(task: BlockTask, tasks: Iterable[BlockTask]) -> list[BlockTask]:
    """What gives the gradient that a reduction reduces."""
    kinds = ("A'", "Aw") if task.kind == "Ra" else ("E'", "Ew")
    return [one for one in tasks if one.block == task.block and one.kind in kinds]


def _peak(schedule: BlockSchedule, costs: BlockCosts, spans: Iterable[Span]) -> float:
    """Rows kept between forward and backward pass at once, over those of the batch.

    Half of what a block keeps is counted for attention, from its start to its gradient, half for its experts.
    """
    begun = {(task.kind, task.block, task.chunk): start for task, start, _ in spans if task.kind in ("A", "E")}
    changes: list[tuple[float, float]] = []
    for task, _, end in spans:
        if task.kind in ("A'", "Aw", "E'", "Ew"):
            kind = task.kind[0]
            parts = schedule.attention_chunks if kind == "A" else schedule.expert_chunks
            share = costs.part(task.chunk, parts) / costs.rows / 2
            changes += [(begun[kind, task.block, task.chunk], share), (end, -share)]
    # What ends makes room for what begins at the same moment.
    return max(itertools.accumulate(change for _, change in sorted(changes)), default=0.0)


def _resource(span: Span) -> int:
    return ("compute", "wire", "inner").index(span[0].resource)


def _wires(spans: Iterable[Span]) -> list[tuple[float, float]]:
    return [(start, end) for task, start, end in spans if task.resource != "compute"]


def _union(parts: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(parts):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _length(parts: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in parts)
