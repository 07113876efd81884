"""What decoding on the CPU is meant to reach, and whether a run of benchmarks.decoding reached it."""

import dataclasses
import math
import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.decoding_models import SHAPES

__all__ = ["Bar", "judge", "table"]

# At most so many times the other's time, or its own.
AGAINST_LLAMA = {"fp32": 0.95, "bf16": 0.95, "int8": 1.0, "int4": 1.1}
ALONE = {"fp32": {1: 1.10, 2: 1.15, 4: 1.3}, "bf16": {1: 1.25, 2: 1.3, 4: 1.5}}
MANY, MANY_LLAMA, MANY_ADOPTED = 16, 0.4, 0.67
PREFILL_LLAMA, PREFILL_TRANSFORMERS, ONE_TRANSFORMERS, RESIDENT = 0.6, 0.9, 0.3, 1.15
ELSEWHERE = (
    "The bars of the layer and of whole adopted models over the grid are measured by benchmarks.moe_layer and "
    "benchmarks.hf_models, what few bits cost in nats by `turnout certify`."
)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One thing to reach, over all that it was measured in.

    Args:
        what: is compared with what.
        allowed: the most.
        found: where -> what was measured.
    """

    what: str
    allowed: float
    found: dict[str, float]

    @property
    def worst(self) -> str:
        """Where it is the most."""
        return max(self.found, key=lambda where: self.found[where])

    @property
    def met(self) -> int:
        """In how many it is reached."""
        return sum(value <= self.allowed for value in self.found.values())

    def row(self) -> str:
        """As a line of the table."""
        values = [max(value, 1e-9) for value in self.found.values()]  # memory of a tiny model may seem to be none
        mean = math.exp(statistics.fmean(map(math.log, values)))
        said = "met" if self.met == len(self.found) else f"**missed**, met in {self.met} of {len(self.found)}"
        worst = self.found[self.worst]
        return f"| {self.what} | <= {self.allowed:.2f} | {worst:.2f} | {self.worst} | {mean:.2f} | {said} |"


def ratios(times: dict[str, list[list[float]]], to: str, *, wall: bool = False) -> list[float]:
    """Time of turnout over another's, of each round."""
    return [ours[wall] / theirs[wall] for ours, theirs in zip(times["turnout"], times[to], strict=True)]


def judge(record: dict[str, Any]) -> list[Bar]:
    """Every bar that this run measured."""
    found: dict[tuple[str, float], dict[str, float]] = {}
    for what, allowed, where, value in (*_cells(record), *_memory(record), *_alone(record)):
        found.setdefault((what, allowed), {})[where] = value
    return [Bar(what, allowed, values) for (what, allowed), values in found.items()]


def _cells(record: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    for case in record["cases"]:
        kind, job, streams, times = (case[name] for name in ("kind", "job", "streams", "times"))
        if "turnout" not in times:
            continue
        bars = list[tuple[str, str, float]]()
        if job == "steps" and streams == 1:
            bars = [("one stream", "llama.cpp", AGAINST_LLAMA[kind]), ("one stream", "transformers", ONE_TRANSFORMERS)]
        elif job == "steps" and streams == MANY:
            bars = [(f"{MANY} streams", "llama.cpp", MANY_LLAMA), (f"{MANY} streams", "adopted", MANY_ADOPTED)]
        elif job == "prefill":
            bars = [("prefill", "llama.cpp", PREFILL_LLAMA), ("prefill", "transformers", PREFILL_TRANSFORMERS)]
        read = f", after {case['context']}" if job == "steps" else ""
        where = f"{case['shape']}{read}, {case['threads']} thread{'s' * (case['threads'] > 1)}"
        for what, to, allowed in bars:
            if to in times:
                yield f"{what}, {kind}, over {NAMES[to]}", allowed, where, statistics.median(ratios(times, to))


def _memory(record: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    for one in record["memory"]:
        if one["peer"] == "turnout":
            yield f"resident memory, {one['kind']}, over weights and cache", RESIDENT, one["shape"], resident(one)


def resident(one: dict[str, Any], peak: bool = False) -> float:
    """What a process came to hold with a model, over the model and its cache."""
    name = "peak_bytes" if peak else "resident_bytes"
    return (one[name] - one["before_bytes"]) / (one["weights_bytes"] + one["cache_bytes"])


def _alone(record: dict[str, Any]) -> Iterator[tuple[str, float, str, float]]:
    for one in record["alone"]:
        kind, rows = one["kind"], one["rows"]
        what = f"experts alone, {kind}, {rows} row{'s' * (rows > 1)} each, over a sweep"
        yield what, ALONE[kind][rows], one["shape"], one["ours_us"] / one["sweep_us"]


NAMES = {"turnout": "turnout", "transformers": "transformers' default", "adopted": "adopted transformers",
         "llama.cpp": "llama.cpp"}  # fmt: skip


def table(bars: list[Bar]) -> list[str]:
    """The bars as lines of a page."""
    met = sum(bar.met == len(bar.found) for bar in bars)
    shapes = {where.split(",")[0] for bar in bars for where in bar.found}
    return [
        f"{met} of {len(bars)} bars are met everywhere. The most of all models, contexts and threads, where that is, "
        "and the geometric mean. " + "; ".join(f"{name}: {SHAPES[name].says}" for name in SHAPES if name in shapes)
        + f". {ELSEWHERE}",
        "",
        "| CPU time (memory), ratios of the same round | bar | the most | where | mean | |",
        "|---|---|---|---|---|---|",
        *(bar.row() for bar in bars),
    ]  # fmt: skip
