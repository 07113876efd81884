"""Sparse transport against the linear program, quadratic transport, and its own dual."""

import itertools

import numpy as np
import pytest

from turnout.errors import ShapeError, UsageError
from turnout.solve.transport import transport
from turnout.solve.transport_sparse import sparse_projection, transport_sparse


def problem(seed, tokens=32, experts=4):
    return np.random.default_rng(seed).normal(size=(experts, tokens))


@pytest.mark.parametrize("seed", range(3))
def test_with_one_entry_it_is_the_assignment(seed):
    cost_ET = problem(seed)
    plan = transport_sparse(cost_ET, np.full(4, 8.0), np.ones(32), k=1)
    best = transport(cost_ET.T, np.full(4, 8))
    assert plan.dual == pytest.approx(best.value + 0.5 * 32, abs=1e-6)
    assert np.array_equal(plan.plan_MN.argmax(0), best.column_M)


@pytest.mark.parametrize("seed", range(3))
def test_the_value_falls_with_k_and_all_entries_meet_both_sums(seed):
    cost_ET = problem(seed)
    plans = [transport_sparse(cost_ET, np.full(4, 8.0), np.ones(32), k=k) for k in (1, 2, 3, 4)]
    duals = [plan.dual for plan in plans]
    assert all(a >= b - 1e-9 for a, b in itertools.pairwise(duals))
    for k, plan in zip((1, 2, 3, 4), plans, strict=True):
        assert int((plan.plan_MN > 1e-12).sum(0).max()) <= k
        np.testing.assert_allclose(plan.plan_MN.sum(0), 1, atol=1e-12)
    np.testing.assert_allclose(plans[-1].plan_MN.sum(1), 8, atol=1e-5)
    cost = (plans[-1].plan_MN * cost_ET).sum() + 0.5 * (plans[-1].plan_MN ** 2).sum()
    assert cost == pytest.approx(duals[-1], abs=1e-5)  # strong duality


def test_the_projection_is_the_nearest_point():
    """Brute force over a grid of the simplex with two entries."""
    x = np.array([[0.2], [1.1], [0.9]])
    best = min(
        (float(((p - x[:, 0]) ** 2).sum()), tuple(p))
        for a in np.linspace(0, 1, 101)
        for p in (np.array([a, 1 - a, 0]), np.array([a, 0, 1 - a]), np.array([0, a, 1 - a]))
    )[1]
    np.testing.assert_allclose(sparse_projection(x, 2)[:, 0], best, atol=1e-2)


def test_what_cannot_be_is_refused():
    with pytest.raises(ShapeError, match="row_M and column_N"):
        transport_sparse(problem(0), np.ones(4), np.ones(32), k=1)
    with pytest.raises(UsageError, match="gamma"):
        transport_sparse(problem(0), np.full(4, 8.0), np.ones(32), k=0)
