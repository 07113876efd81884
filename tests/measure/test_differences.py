"""Differences between arms on the same seeds: what is planted is found, and chance is not."""

import numpy as np
import pytest
from scipy import stats

from turnout.errors import DataError, UnknownNameError
from turnout.measure.differences import paired_differences


def table(chance, arms, seeds, shift=None, noise=0.01):
    """Arms that differ by nothing but noise; seeds differ much."""
    of_seed = chance.normal(size=seeds)
    found = {f"arm{a}": (3 + of_seed + noise * chance.normal(size=seeds)).tolist() for a in range(arms)}
    for name, by in (shift or {}).items():
        found[name] = [value + by for value in found[name]]
    return found


def test_two_arms_are_the_paired_t_test():
    chance = np.random.default_rng(0)
    values = table(chance, 2, 6, {"arm1": 0.01})
    (found,) = paired_differences(values, against="arm0")
    theirs = stats.ttest_rel(values["arm1"], values["arm0"])
    assert found.p_value == pytest.approx(theirs.pvalue, rel=1e-9)
    low_high = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low_high.low, low_high.high), rel=1e-9)


def test_what_is_planted_is_found_with_three_seeds():
    chance = np.random.default_rng(1)
    found = {d.arm: d for d in paired_differences(table(chance, 20, 3, {"arm7": -0.1}), against="arm0")}
    assert found["arm7"].is_real and found["arm7"].high < 0
    assert found["arm7"].mean == pytest.approx(-0.1, abs=0.03)


def test_chance_alone_is_seldom_called_real_in_a_whole_table():
    chance, called, within, total = np.random.default_rng(2), 0, 0, 0
    for _ in range(400):
        found = paired_differences(table(chance, 12, 3), against="arm0")
        called += any(d.is_real for d in found)
        within += sum(d.low <= 0 <= d.high for d in found)
        total += len(found)
    assert called <= 0.08 * 400, f"{called} of 400 tables had a difference that is none"
    assert 0.92 < within / total < 0.98, "intervals of 95 %"


def test_equal_arms_have_no_difference_and_constant_ones_a_real_one():
    same, other = paired_differences({"a": [1.0, 2.0], "b": [1.0, 2.0], "c": [2.0, 3.0]}, against="a")
    assert (same.mean, same.p_value, same.is_real) == (0, 1, False)
    assert other.mean == 1 and other.p_value < 1e-9 and other.is_real


@pytest.mark.parametrize(
    "values",
    [{"a": [1.0, 2.0]}, {"a": [1.0], "b": [2.0]}, {"a": [1.0, 2.0], "b": [1.0]}, {"a": [1, 2], "b": [1, np.nan]}],
)
def test_tables_that_say_nothing_are_refused(values):
    with pytest.raises(DataError):
        paired_differences(values, against="a")


def test_an_unknown_arm():
    with pytest.raises(UnknownNameError, match="TopK"):
        paired_differences({"TopK": [1.0, 2.0], "b": [2.0, 3.0]}, against="TopQ")
