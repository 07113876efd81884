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
MANY, MANY_LLAMA, MANY_ADOPTED = 16, 0.4, 0.67
PREFILL_LLAMA, PREFILL_TRANSFORMERS, ONE_TRANSFORMERS, RESIDENT = 0.6, 0.9, 0.3, 1.15
ELSEWHERE = (
    "The bars of the layer and of whole adopted models over the grid are measured by benchmarks.moe_layer and "
    "benchmarks.hf_models, what few bits cost in nats by benchmarks.bits."
)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One thing to reach, over all that it was measured in.

    Args:
        what: is compared with what.
        allowed: the most.
        found: where -> what was measured.
        least: where -> what the limit comes to in the same ratio: no library gets below it there.
    """

    what: str
    allowed: float
    found: dict[str, float]
    least: dict[str, float]

    @property
    def worst(self) -> str:
        """Where it is the most."""
        return max(self.found, key=lambda where: self.found[where])

    @property
    def met(self) -> int:
        """In how many it is reached."""
        return sum(value <= self.allowed for value in self.found.values())

    @property
    def beyond(self) -> int:
        """In how many the limit itself is above the bar."""
        return sum(value > self.allowed for value in self.least.values())

    def row(self) -> str:
        """As a line of the table."""
        said = "met" if self.met == len(self.found) else f"**missed**, met in {self.met} of {len(self.found)}"
        if self.beyond:
            said += f"; the limit is above the bar in {self.beyond}"
        there = f"{self.least[self.worst]:.2f}" if self.worst in self.least else ""
        means = [f"{_mean(values):.2f}" if values else "" for values in (self.found, self.least)]
        cells = [self.what, f"<= {self.allowed:.2f}", f"{self.found[self.worst]:.2f}", there, self.worst, *means, said]
        return f"| {' | '.join(cells)} |"


def _mean(values: dict[str, float]) -> float:
    """The geometric one; memory of a tiny model may seem to be none."""
    return math.exp(statistics.fmean(math.log(max(value, 1e-9)) for value in values.values()))


def ratios(times: dict[str, list[list[float]]], to: str, *, of: str = "turnout", wall: bool = False) -> list[float]:
    """Time of turnout, or of another, over another's, of each round."""
    return [ours[wall] / theirs[wall] for ours, theirs in zip(times[of], times[to], strict=True)]


def judge(record: dict[str, Any]) -> list[Bar]:
    """Every bar that this run measured."""
    bars: dict[tuple[str, float], Bar] = {}
    for what, allowed, where, value, least in (*_cells(record), *_memory(record), *_alone(record)):
        bar = bars.setdefault((what, allowed), Bar(what, allowed, {}, {}))
        bar.found[where] = value
        if least is not None:
            bar.least[where] = least
    return list(bars.values())


Found = tuple[str, float, str, float, float | None]


def _cells(record: dict[str, Any]) -> Iterator[Found]:
    for case in (case for piece in record["pieces"] for case in piece["cases"]):
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
                least = statistics.median(ratios(times, to, of="limit")) if "limit" in times else None
                value = statistics.median(ratios(times, to))
                yield f"{what}, {kind}, over {NAMES[to]}", allowed, where, value, least


def _memory(record: dict[str, Any]) -> Iterator[Found]:
    for one in (one for piece in record["pieces"] for one in piece["memory"]):
        if one["peer"] == "turnout":
            where = f"{one['shape']}, {one['threads']} thread{'s' * (one['threads'] > 1)}"
            yield f"resident memory, {one['kind']}, over weights and cache", RESIDENT, where, resident(one), None


def resident(one: dict[str, Any], peak: bool = False) -> float:
    """What a process came to hold with a model, over the model and its cache."""
    name = "peak_bytes" if peak else "resident_bytes"
    return (one[name] - one["before_bytes"]) / (one["weights_bytes"] + one["cache_bytes"])


def _alone(record: dict[str, Any]) -> Iterator[Found]:
    for one in record["alone"]:
        rows = one["rows"]
        what = f"experts alone, {one['form']}, {rows} row{'s' * (rows > 1)} each, over a sweep"
        yield what, one["bar"], one["shape"], one["ratio"], None


NAMES = {"turnout": "turnout", "transformers": "transformers' default", "adopted": "adopted transformers",
         "llama.cpp": "llama.cpp"}  # fmt: skip


def table(bars: list[Bar]) -> list[str]:
    """The bars as lines of a page."""
    met = sum(bar.met == len(bar.found) for bar in bars)
    shapes = {where.split(",")[0] for bar in bars for where in bar.found}
    limited, beyond = sum(len(bar.least) for bar in bars), sum(bar.beyond for bar in bars)
    above = f"In {beyond} of {limited} places the limit itself is above the bar. " if limited else ""
    return [
        f"{met} of {len(bars)} bars are met everywhere. The most of all models, contexts and threads, the limit in the "
        "same ratio there, and geometric means of both. " + above + "; ".join(
            f"{name}: {SHAPES[name].says}" for name in SHAPES if name in shapes)
        + f". {ELSEWHERE}",
        "",
        "| CPU time (memory), ratios of the same round | bar | the most | limit | where | mean | limit | |",
        "|---|---|---|---|---|---|---|---|",
        *(bar.row() for bar in bars),
    ]  # fmt: skip
