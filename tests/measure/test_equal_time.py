"""Two trainings by the clock: only where one machine took it, both logged it, and there is something to compare."""

import dataclasses

import pytest

from turnout.measure import RunData
from turnout.measure.equal_time import EqualTime, equal_time, flops_ratio
from turnout.show.headline import at_equal_time, headline
from turnout.types import Cost


def run(name: str, *points: tuple[float, float], seed: int = 0, width: int = 8, **changes: object) -> RunData:
    """A finished run whose evaluations were at these seconds."""
    lines = tuple(
        {"kind": "eval", "step": n, "tokens": 100 * n, "seconds": at, "bits_per_byte": bits, "bytes": 50}
        for n, (at, bits) in enumerate(points, 1)
    )
    found = RunData(
        name,
        config={"model": {"width": width}, "train": {"seed": seed}},
        metrics=lines,
        result={"bits_per_byte": points[-1][1], "bytes": 100},
        cost=Cost(flops=10.0),
        hardware={"cpu": "x", "torch": "2", "threads": 2},
        texts=("held_out_text a",),
    )
    return dataclasses.replace(found, **changes)


def slow(**changes: object) -> RunData:
    return run("slow", (60.0, 3.0), (180.0, 2.0), width=16, **changes)


def fast(**changes: object) -> RunData:
    return run("fast", (40.0, 3.1), (120.0, 2.2), **changes)


def test_the_longer_one_is_read_where_the_shorter_ends() -> None:
    assert equal_time([slow()], [fast()]) == EqualTime(1.5, 120.0, 2.5, 2.2)
    assert equal_time([fast()], [slow()]) == EqualTime(120 / 180, 120.0, 2.2, 2.5)


def test_seeds_are_averaged_at_the_end_of_the_shortest_of_all() -> None:
    other = run("fast", (40.0, 3.1), (100.0, 2.4), seed=1)
    found = equal_time([slow()], [fast(), other])
    assert found is not None
    assert (found.times, found.seconds) == (pytest.approx(180 / 110), 100.0)
    assert found.other_bits == pytest.approx((2.4 + 3.1 - 0.9 * 60 / 80) / 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"hardware": {"cpu": "x", "torch": "2", "threads": 4}},
        {"hardware": {"cpu": "y", "torch": "2", "threads": 2}},
        {"hardware": {}},
        {"result": {}},
        {"metrics": ()},
        {"metrics": tuple({k: v for k, v in line.items() if k != "seconds"} for line in fast().metrics)},
        {"metrics": tuple({**line, "bytes": 49} for line in fast().metrics)},
        {"metrics": tuple({**line, "seconds": line["seconds"] / 4} for line in fast().metrics)},
    ],
)
def test_times_that_do_not_compare_are_not_compared(changes: dict) -> None:
    other = fast(**changes)
    assert equal_time([slow()], [other]) is None and equal_time([other], [slow()]) is None
    assert at_equal_time([slow(), other]) == "" and "as long" not in headline([slow(), other])


def test_the_headline_says_what_the_better_one_took_and_where_it_stood() -> None:
    runs = [fast(), slow()]
    assert headline(runs) == (
        "slow needs 2.000 bits per byte on held-out text, 9.1 % less than fast at equal FLOPs (one seed each), and "
        "took 1.50 times as long"
    )
    assert at_equal_time(runs) == (
        "After 2:00, when the shorter training ended, slow needed 2.500 bits per byte in its evaluations, 13.6 % more "
        "against the 2.200 of fast (one seed each); slow was then in the middle of its learning-rate schedule."
    )


def test_other_flops_are_said() -> None:
    twice = slow(cost=Cost(flops=20.0))
    assert flops_ratio([twice], [fast()]) == 2.0 and flops_ratio([slow(cost=Cost())], [fast()]) is None
    assert "less than fast with 2.00 times the FLOPs (one seed each)" in headline([fast(), twice])
