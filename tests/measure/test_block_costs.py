"""Lines are found again in times that follow them, whatever else the machine did; and so is what overlap costs."""

import dataclasses
import random

import pytest

from turnout.errors import UsageError
from turnout.measure import fit_block_costs, fit_slowed
from turnout.run.blocks.block_profile import serial
from turnout.types import BlockCosts, Line

TRUTH = BlockCosts.even(attention=1.0, experts=2.0, dispatch=0.5, reduce=0.4, gate=0.1, start=0.02, rows=96)
SIZE, KINDS = TRUTH.dense_bytes, ("attention", "experts_back", "dispatch", "gate_back", "reduce", "experts_weight")


def steps(noise: float, seed: int = 0) -> list:
    rng, found = random.Random(seed), []
    for parts in (1, 2, 3):
        for halved in (False, True):
            sizes = tuple((i + 1) * SIZE // parts - i * SIZE // parts for i in range(parts))
            schedule = serial(2, parts, dense=sizes, halved=halved)
            for _ in range(9):
                times = {task: TRUTH.seconds(task, schedule) for task in schedule.tasks}
                # Something else ran now and then: never shorter.
                late = {task: t * (1 + noise * (rng.random() < 0.2) * rng.random()) for task, t in times.items()}
                found.append((schedule, late))
    return found


@pytest.mark.parametrize("noise", [0.0, 3.0])
def test_lines_are_found_again(noise: float) -> None:
    found = fit_block_costs(steps(noise), rows=96, dense_bytes=SIZE)
    for kind in KINDS:
        line, true = getattr(found, kind), getattr(TRUTH, kind)
        assert line(96 if kind != "reduce" else SIZE) == pytest.approx(true(96 if kind != "reduce" else SIZE), rel=0.02)
        assert line.start_s == pytest.approx(true.start_s, rel=0.2), kind


def test_no_line_goes_below_nothing() -> None:
    falling = [
        (s, dict.fromkeys(times, 2.0 if s.attention_chunks == 3 else 1.0 / s.attention_chunks))
        for s, times in steps(0.0)
    ]
    found = fit_block_costs(falling, rows=96, dense_bytes=SIZE)
    assert all(line.start_s >= 0 and line.each_s >= 0 for line in vars(found).values() if isinstance(line, Line))


def test_one_size_alone_is_no_line() -> None:
    whole = [step for step in steps(0.0) if step[0].attention_chunks == 1]
    with pytest.raises(UsageError, match="the times of attention tasks must be of at least two sizes"):
        fit_block_costs(whole, rows=96, dense_bytes=SIZE)


def test_how_much_they_slow_each_other_down_is_found() -> None:
    schedule, at, spans = serial(1, 2, dense=(SIZE,)), 0.0, {}
    for task in schedule.tasks:  # all of compute in a row, all of the wire beside it
        if task is schedule.wire[0]:
            at = 0.0
        more = 1.25 if task.resource == "compute" else 1.0
        spans[task] = (at, at + more * TRUTH.seconds(task, schedule))
        at = spans[task][1]
    wire = max(end for task, (_, end) in spans.items() if task.resource == "wire")
    beside = {task: span for task, span in spans.items() if span[1] <= wire}
    chip, slowed = fit_slowed([(schedule, beside)], dataclasses.replace(TRUTH))
    assert chip == pytest.approx(0.25, rel=0.01) and slowed == 0
