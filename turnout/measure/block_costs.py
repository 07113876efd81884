"""What each kind of task of a sparse block takes here: lines fitted to the times of steps that were played."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from turnout.errors import UsageError, word
from turnout.expects import Kind, expects
from turnout.types import BlockCosts, BlockSchedule, BlockTask, Line

__all__ = ["fit_block_costs", "fit_slowed"]

_WHERE = "turnout.measure.fit_block_costs"
Steps = Sequence[tuple[BlockSchedule, Mapping[BlockTask, float]]]


def _are_steps(value: object) -> bool:
    whole = isinstance(value, Sequence) and not isinstance(value, str | bytes)
    return whole and all(
        isinstance(one, tuple) and len(one) == 2 and isinstance(one[0], BlockSchedule) for one in value
    )


_STEPS = Kind(_are_steps, "a list of schedules, each with its tasks' seconds", "pass what profile_blocks gave")
_NAMES = {
    "A": "attention",
    "G": "gate",
    "D": "dispatch",
    "E": "experts",
    "C": "combine",
    "Ax": "attention_input",
    "Aw": "attention_weight",
    "A'": "attention_back",
    "G'": "gate_back",
    "Ex": "experts_input",
    "Ew": "experts_weight",
    "E'": "experts_back",
    "R": "reduce",
}
# An all-to-all of a backward pass moves the same rows as one of the forward pass, the other way.
_SAME = {"C'": "C", "D'": "D", "Ra": "R", "Re": "R"}


@expects(steps=_STEPS)
def fit_block_costs(
    steps: Steps, *, rows: int, dense_bytes: int, expert_bytes: int = 0, most_chunks: int = 16, sums: bool = True
) -> BlockCosts:
    """The line alpha + beta n of each kind of task, from how long tasks of several sizes took.

    Of each size the median counts, since what disturbs a machine makes some tasks longer and none shorter; through the
    medians goes the line that has the smallest sum of squared errors, each as a part of its median, and neither alpha
    nor beta below 0.

    Args:
        steps: each schedule that was played, and how many seconds each task took. Every kind has to be there in at
            least two sizes, and with halves as well as without, such as ``turnout.run.profile_blocks`` plays.
        rows: tokens of a device's batch.
        dense_bytes: of a block's dense gradient.
        expert_bytes: of its experts' gradient that is to be summed.
        most_chunks: the most parts that rows can be cut into.
        sums: whether the loss is a sum over rows.

    Raises:
        UsageError: a kind of task that was never played, or in one size alone.

    >>> kinds, steps = "A G E E' Ex Ew G' A' Ax Aw".split(), []
    >>> for parts in (1, 2):
    ...     tasks = [BlockTask(kind, 0, chunk) for kind in kinds for chunk in range(parts)]
    ...     wire = [BlockTask(kind, 0, chunk) for kind in ("D", "C", "Ra") for chunk in range(parts)]
    ...     schedule = BlockSchedule(1, parts, parts, tuple(tasks), tuple(wire), dense_bytes=(64 // parts,) * parts)
    ...     steps.append((schedule, {task: 1 + 8 / parts for task in schedule.tasks}))
    >>> costs = fit_block_costs(steps, rows=8, dense_bytes=64)
    >>> round(costs.attention.start_s, 6), round(costs.attention.each_s, 6), round(costs.reduce.each_s, 6)
    (1.0, 1.0, 0.125)

    Source: Pan et al., 2025, "FSMoE", section 5: t = alpha + beta n by least squares. The medians are ours.
    """
    seen: dict[str, dict[float, list[float]]] = {kind: {} for kind in _NAMES}
    for schedule, times in steps:
        for task, seconds in times.items():
            kind = _SAME.get(task.kind, task.kind)
            seen[kind].setdefault(_size(task, schedule, rows), []).append(seconds)
    lines: dict[str, Any] = {_NAMES[kind]: _line(_NAMES[kind], sizes) for kind, sizes in seen.items()}
    known: dict[str, Any] = {"dense_bytes": dense_bytes, "expert_bytes": expert_bytes, "most_chunks": most_chunks}
    return BlockCosts(rows=rows, sums=sums, **known, **lines)


def _size(task: BlockTask, schedule: BlockSchedule, rows: int) -> int:
    """Of a task, its rows; of a reduction, its bytes."""
    if task.kind in ("Ra", "Re"):
        return (schedule.dense_bytes if task.kind == "Ra" else schedule.expert_bytes)[task.chunk]
    parts = schedule.attention_chunks if task.kind[0] in "AG" else schedule.expert_chunks
    return (task.chunk + 1) * rows // parts - task.chunk * rows // parts


def _line(name: str, sizes: Mapping[float, Sequence[float]]) -> Line:
    if len(sizes) < 2:
        allowed, fix = "be of at least two sizes", "play steps of one and of several chunks, with halves and without"
        raise UsageError(word(f"the times of {name} tasks", got=sorted(sizes), allowed=allowed, where=_WHERE, fix=fix))
    n, t = (np.array(each, dtype=float) for each in zip(*((s, np.median(v)) for s, v in sizes.items()), strict=True))
    # Errors count as parts of what they are errors of: else the largest chunks alone would decide.
    weight = 1 / np.maximum(t, 1e-9)
    start, each = np.linalg.lstsq(np.stack([weight, n * weight], 1), t * weight, rcond=None)[0]
    if each < 0:
        start, each = float(np.average(t, weights=weight)), 0.0
    elif start < 0:
        start, each = 0.0, float((weight**2 * n * t).sum() / (weight**2 * n * n).sum())
    return Line(float(start), float(each))


@expects(steps=_STEPS, costs=BlockCosts)
def fit_slowed(
    steps: Sequence[tuple[BlockSchedule, Mapping[BlockTask, tuple[float, float]]]], costs: BlockCosts
) -> tuple[float, float]:
    """How much more time compute takes while a wire is busy, and a wire while compute is: kappa, never below 0.

    A task that takes d alone, and t of which o beside others, has t = d + o k / (1 + k): the k of least squares.

    Args:
        steps: schedules that overlap, and when each task began and ended.
        costs: what tasks take alone, from ``fit_block_costs``.

    >>> task, wire = BlockTask("E", 0, 0), BlockTask("D", 0, 0)
    >>> schedule = BlockSchedule(1, 1, 1, (task,), (wire,))
    >>> costs = BlockCosts.even(attention=1.0, experts=1.0, dispatch=1.0, reduce=0.0)
    >>> fit_slowed([(schedule, {task: (0.0, 1.1), wire: (0.0, 1.1)})], costs)
    (0.1, 0.1)

    Source: none; the card's measured slow-down.
    """
    found = []
    for mine in (lambda task: task.resource == "compute", lambda task: task.resource != "compute"):
        product = square = 0.0
        for schedule, times in steps:
            others = [span for task, span in times.items() if not mine(task)]
            for task, (start, end) in times.items():
                if mine(task):
                    beside = sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in others)
                    product += (end - start - costs.seconds(task, schedule)) * beside
                    square += beside * beside
        share = min(max(product / square if square else 0.0, 0.0), 0.9)
        found.append(round(share / (1 - share), 6))
    return found[0], found[1]
