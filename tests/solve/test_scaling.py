"""The scaling law of routed models: exact losses give its numbers back, and nothing is said outside the models."""

import math

import numpy as np
import pytest

from turnout.errors import DataError, UsageError
from turnout.solve import fit_scaling

SIZES, COUNTS = (15e6, 55e6, 130e6, 370e6, 1.3e9), (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PARAMS, EXPERTS = (one.ravel() for one in np.meshgrid(SIZES, COUNTS))


def law(params, experts, *, a=-0.082, b=-0.108, c=0.009, d=1.104, start=1.847, most=314.478):
    """The paper's equation 7 and 6, with its numbers for S-BASE."""
    flat = 1 / (1 / (experts - 1 + 1 / (1 / start - 1 / most)) + 1 / most)
    x, y = np.log10(params), np.log10(flat)
    return 10 ** (a * x + b * y + c * x * y + d)


@pytest.mark.parametrize("seed", range(3))
def test_exact_losses_give_all_six_numbers_back(seed):
    found = fit_scaling(PARAMS, EXPERTS, law(PARAMS, EXPERTS), draws=0, seed=seed)
    wanted = {"a": -0.082, "b": -0.108, "c": 0.009, "d": 1.104, "start": 1.847, "most": 314.478}
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-4)
    assert found.rmse < 1e-8 and not found.notes


def test_a_dense_model_of_the_effective_size_has_the_same_loss():
    found = fit_scaling(PARAMS, EXPERTS, law(PARAMS, EXPERTS), draws=0)
    size = found.effective(370e6, 64)
    assert size == pytest.approx(1.369e9, rel=1e-3)  # as the published numbers have it
    assert found.loss(size, 1, extrapolate=True) == pytest.approx(found.loss(370e6, 64), rel=1e-12)
    assert found.effective(370e6, 1) == pytest.approx(370e6, rel=1e-9)
    assert found.cutoff == pytest.approx(10 ** (0.108 / 0.009), rel=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_with_noise_the_numbers_are_within_their_intervals_and_a_law_without_interaction_is_worse(seed):
    chance = np.random.default_rng(seed)
    losses = law(PARAMS, EXPERTS) * 10 ** (0.002 * chance.normal(size=len(PARAMS)))
    whole, plain = fit_scaling(PARAMS, EXPERTS, losses), fit_scaling(PARAMS, EXPERTS, losses, law="separable", draws=0)
    assert whole.a == pytest.approx(-0.082, abs=0.004) and whole.c == pytest.approx(0.009, abs=0.004)
    assert whole.rmse < 0.0022 < 0.004 < plain.rmse and plain.c == 0
    inside = [low <= getattr(whole, name) <= high for name, (low, high) in whole.interval.items()]
    assert all(inside), "a fit lies within what drawing its points anew gives"
    low, high = whole.interval["most"]
    assert high > 1.3 * low, "the end is weakly determined, and that is said"


def test_plain_laws_are_plain():
    losses = law(PARAMS, EXPERTS, start=1 + 1e-12, most=1e12)
    found = fit_scaling(PARAMS, EXPERTS, losses, law="bilinear", draws=0)
    assert (found.start, found.most) == (1, math.inf)
    assert found.b == pytest.approx(-0.108, abs=1e-4) and found.c == pytest.approx(0.009, abs=1e-4)
    line = fit_scaling(PARAMS, EXPERTS, 10 * PARAMS**-0.1 * EXPERTS**-0.05, law="separable", draws=0)
    assert (line.a, line.b, line.d) == pytest.approx((-0.1, -0.05, 1.0), abs=1e-6) and line.cutoff == math.inf


def test_nothing_is_said_outside_the_models_unless_asked_for_and_then_how_far():
    found = fit_scaling(PARAMS, EXPERTS, law(PARAMS, EXPERTS), draws=0)
    assert found.outside(1e8, 10) == 0 and found.outside(1.3e9, 512) == 0
    assert found.outside(1.3e10, 512) == pytest.approx(1.0, abs=1e-6)
    assert found.outside(1e8, 5120) == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(UsageError, match=r"1\.00 decades outside"):
        found.loss(1.3e10, 512)
    with pytest.raises(UsageError, match="extrapolate=True"):
        found.effective(1.3e10, 512)
    assert found.loss(1.3e10, 512, extrapolate=True) < found.loss(1.3e9, 512)
    # Between two lines of models is not among them: the hull is of the points, not a box.
    bent = [(1e6, 1), (1e6, 64), (1e8, 1), (1e7, 1), (1e7, 4), (1e6, 8)]
    thin = fit_scaling(*zip(*bent, strict=True), [3.0, 2.9, 2.5, 2.8, 2.7, 2.95], law="separable", draws=0)
    assert thin.outside(1e8, 64) > 0.5 and thin.outside(1e6, 32) == 0


@pytest.mark.parametrize("wrong", [(math.nan, 1), (0, 1), (-1e6, 1), (1e6, 0.5), (math.inf, 1)])
def test_models_that_cannot_be_are_refused(wrong):
    found = fit_scaling(PARAMS, EXPERTS, law(PARAMS, EXPERTS), draws=0)
    with pytest.raises(UsageError, match="above 0"):
        found.loss(*wrong, extrapolate=True)


@pytest.mark.parametrize(
    ("points", "law_", "words"),
    [
        (([1e6, 1e7], [1, 2], [3.0, 2.9]), "separable", "at least 4"),
        (([1e6] * 8, [1, 2, 4, 8] * 2, [3.0] * 8), "separable", "1 sizes"),
        (([1e6, 1e7] * 4, [1] * 8, [3.0] * 8), "separable", "1 numbers of experts"),
        (([1e6, 1e7] * 4, [1, 2, 2, 1] * 2, [3.0] * 8), "saturating", "4 numbers of experts"),
        (([1e6, 1e7], [1, 2], [3.0]), "separable", "one length"),
        (([1e6, 1e7] * 4, [1, 2, 4, 8] * 2, [3.0, math.nan] * 4), "separable", "finite"),
        (([1e6, 1e7] * 4, [1, 2, 4, 0] * 2, [3.0] * 8), "separable", "experts 1 or more"),
        (([1e6, 0] * 4, [1, 2, 4, 8] * 2, [3.0] * 8), "separable", "above 0"),
    ],
)
def test_points_that_say_nothing_are_refused(points, law_, words):
    with pytest.raises(DataError, match=words):
        fit_scaling(*points, law=law_)


def test_an_unknown_law_is_refused():
    with pytest.raises(UsageError, match="saturating"):
        fit_scaling([1e6], [1], [3.0], law="linear")


def test_an_end_that_the_points_do_not_say_is_named():
    """Few experts: where it ends cannot be seen."""
    few = EXPERTS <= 8
    chance = np.random.default_rng(0)
    losses = law(PARAMS[few], EXPERTS[few]) * 10 ** (0.004 * chance.normal(size=int(few.sum())))
    found = fit_scaling(PARAMS[few], EXPERTS[few], losses)
    assert any("most" in note for note in found.notes), found.notes
