"""Learning rates as functions of the step."""

import itertools
import math

import pytest

from turnout.errors import UsageError
from turnout.train.schedule import cosine, wsd


def test_cosine_meets_its_ends():
    rates = [cosine(s, steps=100, lr=1.0, min_lr=0.1, warmup=10) for s in range(100)]
    assert rates[9] == rates[10] == 1.0 == max(rates)
    assert rates[99] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))
    assert rates[:10] == pytest.approx([(s + 1) / 10 for s in range(10)])


def test_cosine_is_half_way_in_the_middle():
    assert cosine(50, steps=101, lr=1.0) == pytest.approx(0.5)


def test_wsd_is_stable_and_then_decays():
    rates = [wsd(s, steps=100, lr=1.0, min_lr=0.2, warmup=10, decay=0.25) for s in range(100)]
    assert set(rates[10:75]) == {1.0}
    assert rates[75] == pytest.approx(1 - 0.8 * math.sqrt(1 / 25))
    assert rates[99] == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", [cosine, wsd])
@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("steps", [5, 6])
def test_every_step_of_a_short_run_is_in_range(schedule, warmup, steps):
    rates = [schedule(s, steps=steps, lr=1.0, min_lr=0.1, warmup=warmup) for s in range(steps)]
    assert all(0.1 <= rate <= 1.0 for rate in rates)


def test_wsd_decay_gives_way_to_the_warm_up():
    assert wsd(4, steps=6, lr=1.0, warmup=5, decay=1.0) == 1.0
    assert wsd(5, steps=6, lr=1.0, warmup=5, decay=1.0) == 0.0


def test_one_step_runs():
    assert cosine(0, steps=1, lr=1.0) == 1.0
    assert wsd(0, steps=1, lr=1.0, decay=0.0) == 1.0


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"min_lr": 2.0}, {"warmup": 11}, {"warmup": -1}, {"steps": 0}, {"step": -1}, {"decay": 2.0}]
)
def test_wrong_sizes_are_named(wrong):
    with pytest.raises(UsageError, match=next(iter(wrong))):
        wsd(**{"step": 0, "steps": 10, "lr": 1.0, **wrong})
