"""The simulator: hand-counted times of what formulas do not cover, its speed, and the overhead of an engine."""

import time

import pytest

from turnout.decide import device
from turnout.errors import UsageError
from turnout.measure import calibrated, simulate
from turnout.solve import pipeline
from turnout.types import Schedule, StageCosts


def test_messages_between_devices_alone_take_time() -> None:
    costs = StageCosts.even(4, send=0.5)
    # Down to device 1, over the V on it, back up and home: six stages' hops less those that stay on a device.
    v = Schedule.from_csv("0F0,3F0,3B0,0B0\n1F0,2F0,2B0,1B0\n", name="v")
    assert pipeline(v, costs).makespan == 4 * 3 + 4 * 0.5
    looped = Schedule.from_csv("0F0,2F0,2B0,0B0\n1F0,3F0,3B0,1B0\n", name="loop")
    assert pipeline(looped, costs).makespan == 4 * 3 + 6 * 0.5


def test_a_pair_waits_for_both_and_ends_for_both() -> None:
    pair = Schedule.from_csv("0F0,0F1,0B0,0B1\n1F0,(1F1;1B0)OVERLAP_F_B,1B1\n", name="pair")
    times = pipeline(pair, StageCosts.even(2, together=0.5))
    assert times.start_R[1].tolist() == [1.0, 2.0, 3.5] and times.end_R[1].tolist() == [2.0, 3.5, 5.5]
    assert times.start_R[0].tolist() == [0.0, 1.0, 3.5, 5.5]
    assert times.busy_R.tolist() == [6.0, 4.5] and times.peak_R.tolist() == [2.0, 2.0]
    assert pipeline(pair, StageCosts.even(2, together=0.5, overhead=1.0)).end_R[1].tolist()[1] == 4.0 + 3.5


def test_parameters_are_gathered_beside_the_computing() -> None:
    text = "0UNSHARD,0F0,1UNSHARD,1F0,1B0,1RESHARD,0B0,0RESHARD\n"
    costs = StageCosts.even(2, gather=1.5, parameters=10.0)
    times = pipeline(Schedule.from_csv(text, name="zero"), costs)
    # The second gathering begins with the first forward, once the wire is free, and is waited for 0.5.
    assert times.start_R[0].tolist() == [0.0, 1.5, 1.5, 3.0, 4.0, 6.0, 6.0, 8.0]
    assert times.makespan == 8.0 and times.busy_R.tolist() == [6.0]
    assert times.peak_R.tolist() == [22.0]


def test_what_was_dropped_is_gathered_anew_after_that() -> None:
    text = "0UNSHARD,0F0,0RESHARD,0UNSHARD,0B0,0RESHARD\n"
    times = pipeline(Schedule.from_csv(text, name="zero"), StageCosts.even(1, gather=1.5, parameters=10.0))
    assert times.start_R[0].tolist() == [0.0, 1.5, 2.5, 2.5, 4.0, 6.0] and times.peak_R.tolist() == [11.0]


def test_uneven_stages_wait_for_the_slowest() -> None:
    costs = StageCosts((1.0, 3.0), (1.0, 3.0), (1.0, 3.0))
    report = simulate(device.gpipe(2, 4), costs)
    assert report["makespan"] == 1 + 4 * 3 + 4 * 6 + 2 and report["busy_by_rank"] == [12.0, 36.0]
    assert report["bubble"] == pytest.approx(1 - 48 / (2 * 39))


def test_an_engines_overhead_is_found() -> None:
    costs = StageCosts.even(4, send=0.1)
    true = StageCosts.even(4, send=0.1, overhead=0.07)
    runs = [(schedule, pipeline(schedule, true).makespan) for schedule in (device.gpipe(4, 8), device.zb_h1(4, 8))]
    assert calibrated(costs, runs).overhead == pytest.approx(0.07, abs=1e-9)
    assert calibrated(costs, [(device.gpipe(4, 8), 1.0)]).overhead == 0.0
    with pytest.raises(UsageError, match="got none"):
        calibrated(costs, [])
    with pytest.raises(UsageError, match="nan"):
        calibrated(costs, [(device.gpipe(4, 8), float("nan"))])


@pytest.mark.parametrize(("p", "m", "chunks", "most"), [(16, 128, 2, 0.2), (64, 256, 1, 1.0)])
def test_planners_can_ask_often(p: int, m: int, chunks: int, most: float) -> None:
    """Some 12 and 50 ms on an idle core."""
    schedule = device.interleaved_zero_bubble(p, m, chunks=chunks)
    costs, took = StageCosts.even(p * chunks), []
    for _ in range(3):
        begin = time.perf_counter()
        pipeline(schedule, costs)
        took.append(time.perf_counter() - begin)
    assert min(took) < most, took


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"send": -1.0}, "send"),
        ({"forward": float("inf")}, "forward_S"),
        ({"kept": 1.5}, "kept"),
        ({"together": 2.0}, "together"),
    ],
)
def test_costs_that_cannot_be_are_refused(change: dict[str, float], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        StageCosts.even(2, **change)
    with pytest.raises(UsageError, match="1 for 2 stages"):
        StageCosts((1.0, 1.0), (1.0,), (1.0, 1.0))


def test_a_stage_is_cut_into_even_parts() -> None:
    cut = StageCosts.cut(StageCosts((2.0, 4.0), (2.0, 4.0), (1.0, 1.0), send=0.5), 2)
    assert cut.forward_S == (1.0, 1.0, 2.0, 2.0) and cut.held_S == (0.5,) * 4 and cut.send == 0.5
