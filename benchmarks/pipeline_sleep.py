"""Holds the pipeline simulator against real runs: four gloo processes whose stages sleep instead of computing.

    python -m benchmarks.pipeline_sleep [--milliseconds 40] [--steps 3] [--out benchmarks/results]

A stage sleeps so long forward, so long for the gradient of its input and so long for that of its weights, each where
autograd does it; so two cores can run the pipeline of four devices in time. What an action takes beside that (torch's
engine, gloo, a loaded machine) is one number, calibrated before and after each schedule on GPipe with two
microbatches, which is not among the schedules that are judged. Measured is a step of all ranks, from the first start
to the last end; medians of several. The first stage of torch's runtime does the gradient of its input together with
that of its weights.
"""

import argparse
import dataclasses
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from benchmarks.tables import heading, provenance, write
from turnout.decide.device import dual_pipe_v, gpipe, interleaved, looped_breadth_first, one_f_one_b, zb_h1, zbv
from turnout.recipes.spawned import spawned
from turnout.run.ranks.pipeline import Carried, Pipeline
from turnout.solve.pipeline import pipeline
from turnout.types import Schedule
from turnout.types.stage_costs import StageCosts

RANKS, MICROBATCHES = 4, 8
SCHEDULES: Mapping[str, Any] = {
    "GPipe": gpipe,
    "1F1B": one_f_one_b,
    "ZB-H1": zb_h1,
    "Interleaved1F1B": interleaved,
    "LoopedBFS": looped_breadth_first,
    "ZBV": zbv,
    "DualPipeV": dual_pipe_v,
}


@dataclasses.dataclass(frozen=True)
class Row:
    """One schedule: what a step took, what was foretold, and of it what is slept, in seconds."""

    name: str
    chunks: int
    measured_s: float
    simulated_s: float
    slept_s: float

    @property
    def error(self) -> float:
        """By how much the simulator was wrong, as a share of what was measured."""
        return abs(self.measured_s - self.simulated_s) / self.measured_s


@dataclasses.dataclass(frozen=True)
class Report:
    """What came out, at what overhead an action and at what load of the machine."""

    rows: tuple[Row, ...]
    overhead_s: float
    load: float


class _Input(torch.autograd.Function):
    """Sleeps forward, and where the gradient of the input is made."""

    @staticmethod
    def forward(ctx, x: Tensor, forward_s: float, input_s: float) -> Tensor:
        ctx.input_s = input_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx, slope: Tensor):
        time.sleep(ctx.input_s)
        return slope, None, None


class _Weight(torch.autograd.Function):
    """Sleeps where the gradient of the weights is made."""

    @staticmethod
    def forward(ctx, weight: Tensor, weight_s: float) -> Tensor:
        ctx.weight_s = weight_s
        return weight.clone()

    @staticmethod
    def backward(ctx, slope: Tensor):
        time.sleep(ctx.weight_s)
        return slope, None


class Sleeper(nn.Module):
    """A stage that takes its time."""

    def __init__(self, first: bool, last: bool, times: Sequence[float]) -> None:
        super().__init__()
        self.first, self.last, self.times = first, last, tuple(times)
        self.weight = nn.Parameter(torch.ones(1))

    def carries(self, *, x: Tensor) -> Carried:
        """As many numbers as come in."""
        return Carried.of(x)

    def forward(self, carried: Tensor | None = None, *, x: Tensor) -> Tensor:
        """The same numbers, later."""
        forward_s, input_s, weight_s = self.times
        if carried is None:
            carried = x.clone().requires_grad_()
        y = _Input.apply(carried, forward_s, input_s) * _Weight.apply(self.weight, weight_s)
        return y.sum() if self.last else y


def costs(stages: int, times: Sequence[float], overhead: float) -> StageCosts:
    """What the simulator is told of the stages."""
    forward_s, input_s, weight_s = times
    rest = stages - 1
    return StageCosts(
        (forward_s,) * stages,
        (0.0, *(input_s,) * rest),
        (input_s + weight_s, *(weight_s,) * rest),
        overhead=overhead,
    )


def step_s(schedule: Schedule, times: Sequence[float], steps: int) -> float:
    """The median of what a step takes, from the first start to the last end; one before is not timed."""
    rank = dist.get_rank()
    mine = [stage for stage, holder in enumerate(schedule.rank_of_stage) if holder == rank]
    stages = {s: Sleeper(s == 0, s == schedule.stages - 1, times) for s in mine}
    engine = Pipeline(stages, schedule, device=torch.device("cpu"))
    microbatches = [{"x": torch.ones(64)}] * schedule.microbatches
    taken = []
    for _ in range(steps + 1):
        dist.barrier()
        began = time.monotonic()  # one clock for all processes of a machine
        engine.step(microbatches)
        span = torch.tensor([-began, time.monotonic()], dtype=torch.float64)
        dist.all_reduce(span, op=dist.ReduceOp.MAX)
        taken.append(float(span.sum()))
    return statistics.median(taken[1:])


def calibrated(times: Sequence[float], steps: int) -> float:
    """What an action takes beside its own time, so that the simulator is right on GPipe with two microbatches."""
    schedule = gpipe(RANKS, 2)
    measured, low, high = step_s(schedule, times, steps), 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        short = pipeline(schedule, costs(schedule.stages, times, middle)).makespan < measured
        low, high = (middle, high) if short else (low, middle)
    return low


def compare(names: Sequence[str], milliseconds: float, steps: int) -> Report:
    """All of it, on each of the ranks together."""
    torch.set_num_threads(1)
    times = (milliseconds / 1e3,) * 3
    rows, overheads = [], [calibrated(times, steps)]
    for name in names:
        schedule = SCHEDULES[name](RANKS, MICROBATCHES)
        measured = step_s(schedule, times, steps)
        overheads.append(calibrated(times, steps))
        # What else the machine does changes from one schedule to the next: before and after count alike.
        told = [costs(schedule.stages, times, beside) for beside in (statistics.fmean(overheads[-2:]), 0.0)]
        simulated, slept = (pipeline(schedule, one).makespan for one in told)
        rows.append(Row(name, schedule.stages // RANKS, measured, simulated, slept))
    return Report(tuple(rows), statistics.fmean(overheads), os.getloadavg()[0])


def table(report: Report) -> str:
    lines = ["| schedule | stages a rank | measured s | simulated s | error |", "|---|---|---|---|---|"]
    for row in report.rows:
        lines.append(
            f"| {row.name} | {row.chunks} | {row.measured_s:.3f} | {row.simulated_s:.3f} | {100 * row.error:.1f} % |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--milliseconds", type=float, default=40.0, help="of each of the three actions of a stage")
    parser.add_argument("--steps", type=int, default=3, help="of each schedule, of which the median counts")
    parser.add_argument("--out", type=Path, help="folder for the table and its numbers")
    args = parser.parse_args()
    report = spawned(RANKS, compare, list(SCHEDULES), args.milliseconds, args.steps)
    about = provenance()
    beside = f"{1e3 * report.overhead_s:.2f} ms an action beside its own time; load {report.load:.1f}"
    said = f"{RANKS} ranks, {MICROBATCHES} microbatches, {args.milliseconds:g} ms each action; {beside}."
    lines = [*heading("Pipelines that sleep, and their simulator", about), said, "", table(report)]
    print("\n".join(lines))
    write(args.out, "pipeline-sleep", lines, about | dataclasses.asdict(report))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
