"""ZeroPP: what is gathered, what is waited for, and what is held."""

import random

import pytest

from turnout.decide import device
from turnout.errors import UsageError
from turnout.measure import simulate
from turnout.solve import pipeline
from turnout.types import StageCosts


@pytest.mark.parametrize(("p", "m", "chunks"), [(2, 12, 2), (4, 16, 2), (4, 24, 3), (1, 4, 2), (8, 32, 2)])
def test_traffic_falls_with_the_unit(p: int, m: int, chunks: int) -> None:
    for unit in (u for u in range(1, m + 1) if m % u == 0):
        schedule = device.zeropp(p, m, unit=unit, chunks=chunks)
        each = [sum(action.kind == "UNSHARD" for action in order) for order in schedule.actions]
        most = 2 * (chunks - 1) * m // unit + 1
        assert each[0] == most and max(each) == most  # a device whose W are late may keep a stage for the next unit
        assert schedule.count("UNSHARD") == schedule.count("RESHARD")


@pytest.mark.parametrize("p", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("chunks", [2, 3])
def test_from_twice_the_devices_on_no_unit_waits(p: int, chunks: int) -> None:
    """(p - 1)(F + I - W) a step, however many units; where F, I and W take as long."""
    for units, unit in ((1, 2 * p), (3, 2 * p), (2, 2 * p + 1)):
        m = units * unit
        times = pipeline(device.zeropp(p, m, unit=unit, chunks=chunks), StageCosts.even(p * chunks))
        assert times.makespan == pytest.approx(3 * chunks * m + (p - 1), abs=1e-9)


@pytest.mark.parametrize("seed", range(10))
def test_any_counts_make_a_schedule(seed: int) -> None:
    rng = random.Random(seed)
    p, unit, units, chunks = rng.randint(1, 6), rng.randint(1, 9), rng.randint(1, 4), rng.randint(2, 4)
    schedule = device.zeropp(p, unit * units, unit=unit, chunks=chunks)  # which checks itself
    assert schedule.count("F") == schedule.count("W") == p * chunks * unit * units


def test_a_smaller_unit_holds_less() -> None:
    costs = StageCosts.even(8, activation=0.5, gather=0.5, parameters=1.0)
    peaks = [simulate(device.zeropp(4, 32, unit=unit), costs)["peak"] for unit in (4, 8, 16, 32)]
    assert peaks == sorted(peaks) and peaks[0] < peaks[-1] / 2


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="pass unit=4"):
        device.zeropp(2, 8, unit=5)
    with pytest.raises(UsageError, match="pass chunks=2"):
        device.zeropp(2, 8, unit=4, chunks=1)
