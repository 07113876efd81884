"""Chains and integer programs meet brute force; learned costs end no worse than they start."""

import itertools

import numpy as np
import pytest
import torch

from turnout.errors import UsageError
from turnout.solve import chain, milp, surrogate


@pytest.mark.parametrize("seed", range(10))
def test_a_chain_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 4, 4).tolist()
    scores = [rng.standard_normal(pair) for pair in itertools.pairwise(sizes)]
    best = max(
        sum(score[a, b] for score, (a, b) in zip(scores, itertools.pairwise(path), strict=True))
        for path in itertools.product(*map(range, sizes))
    )
    found = chain(sizes, scores.__getitem__)
    path = itertools.pairwise(found.column_M.tolist())
    assert found.value == pytest.approx(best), f"seed {seed}"
    assert sum(score[a, b] for score, (a, b) in zip(scores, path, strict=True)) == pytest.approx(best)


@pytest.mark.parametrize("seed", range(10))
def test_a_knapsack_is_the_best_of_all(seed):
    rng = np.random.default_rng(seed)
    worth, weight = rng.random(7), rng.random(7)
    inside = [x for x in itertools.product((0, 1), repeat=7) if np.dot(x, weight) <= 1.5]
    found = milp(-worth, weight[None], np.array([-np.inf]), np.array([1.5]), integer_N=np.ones(7, bool))
    assert found.optimal and found.gap == 0 and -found.value == pytest.approx(max(np.dot(x, worth) for x in inside))


def test_what_nothing_fits_is_refused():
    with pytest.raises(UsageError, match="have a solution"):
        milp(np.ones(1), np.ones((1, 1)), np.array([2.0]), np.array([3.0]), integer_N=np.array([True]))


@pytest.mark.parametrize("seed", range(5))
def test_with_a_linear_cost_the_learned_choice_is_the_oracles(seed):
    cost = torch.from_numpy(np.random.default_rng(seed).random(6))
    start_N = np.full(6, 0.5) + 1e-3 * np.arange(6)
    found = surrogate(lambda x: (x * cost).sum(), lambda c: np.eye(6)[c.argmin()], start_N, reach=1e3)
    assert found.value == pytest.approx(float(cost.min())) and found.value <= found.first
    with pytest.raises(UsageError, match="between 0 and 1"):
        surrogate(lambda x: x.sum(), lambda c: c, np.ones(2))
