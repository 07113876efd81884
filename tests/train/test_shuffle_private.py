"""Sums are right on average, and what is said of their privacy holds when outcomes are counted out exactly."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import binom

from turnout.errors import UsageError
from turnout.train.federated import private_sgd, shuffled_sum


@pytest.mark.parametrize("eps", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("users", [20, 200])
def test_in_one_dimension_the_exact_delta_is_no_more_than_what_is_said(users, eps):
    """The exact delta of two neighbouring sums: sum over outcomes of max(0, P - e^eps Q), for every shift there is."""
    plan = shuffled_sum(users, 1, bound=1.0, eps=eps, delta=1e-4)
    tosses = plan.users * plan.coins
    z = np.arange(-2 * plan.levels, tosses + 2 * plan.levels + 1)
    p = binom.pmf(z, tosses, 0.5)
    for k in range(-2 * plan.levels, 2 * plan.levels + 1):
        q = binom.pmf(z - k, tosses, 0.5)
        assert np.maximum(0, p - math.exp(plan.eps) * q).sum() <= plan.delta, k
    assert plan.eps <= eps
    half = binom.pmf(z, plan.users * max(1, plan.coins // 16), 0.5)  # with far fewer coins it would be a lie
    far = binom.pmf(z - 2 * plan.levels, plan.users * max(1, plan.coins // 16), 0.5)
    if plan.coins >= 16:
        assert np.maximum(0, half - math.exp(eps) * far).sum() > plan.delta


def test_in_two_dimensions_too():
    plan = shuffled_sum(50, 2, bound=1.0, eps=2.0, delta=1e-3, levels=2)
    tosses = plan.users * plan.coins
    z = np.arange(-8, tosses + 9)
    most = (2 * (plan.levels + math.sqrt(2))) ** 2
    p = np.outer(*[binom.pmf(z, tosses, 0.5)] * 2)
    for a in range(5):
        for b in range(5):
            if a * a + b * b <= most:
                q = np.outer(binom.pmf(z - a, tosses, 0.5), binom.pmf(z - b, tosses, 0.5))
                assert np.maximum(0, p - math.exp(plan.eps) * q).sum() <= plan.delta


def test_more_users_toss_fewer_coins_for_the_same_noise():
    plans = [shuffled_sum(n, 5, bound=1.0, eps=1.0, delta=1e-5) for n in (100, 1000, 10_000)]
    coins = [plan.coins for plan in plans]
    assert coins == sorted(coins, reverse=True) and coins[0] > 5 * coins[1]
    assert plans[1].deviation == pytest.approx(plans[0].deviation, rel=0.1)


def test_sums_are_unbiased_and_as_noisy_as_is_said():
    plan = shuffled_sum(50, 3, bound=2.0, eps=2.0, delta=1e-3)
    chance = torch.Generator().manual_seed(0)
    vectors = [torch.randn(3, generator=chance) for _ in range(50)]
    vectors = [one * min(1.0, 2.0 / float(one.norm())) for one in vectors]
    whole = torch.stack(vectors).double().sum(0)
    found = torch.stack([plan.total([plan.bits(one, chance) for one in vectors]) for _ in range(400)])
    assert ((found.mean(0) - whole).abs() <= 4 * plan.deviation / 20).all()
    assert ((found.std(0) / plan.deviation - 1).abs() < 0.15).all()
    long = plan.bits(torch.tensor([30.0, 0.0, 0.0]), chance)
    assert float(long[0]) <= 2 * plan.levels + plan.coins  # shortened, not believed


def test_sgd_asks_every_user_once_and_gets_near():
    plan = shuffled_sum(200, 2, bound=2.0, eps=2.0, delta=1e-4)
    target, asked = torch.tensor([0.6, -0.3]), []

    def gradient(at, user):
        asked.append(user)
        return at - target

    found = private_sgd(torch.zeros(2), list(range(4050)), gradient, plan=plan, rate=0.3, radius=1.0)
    assert len(asked) == 4000 == len(set(asked))
    assert float((found - target).norm()) < 0.3


def test_what_cannot_be_private_is_refused():
    for wrong in ({"eps": 0.0}, {"delta": 0.0}, {"delta": 1.0}, {"bound": 0.0}, {"levels": -1}):
        with pytest.raises(UsageError, match="the sum"):
            shuffled_sum(10, 2, **({"bound": 1.0, "eps": 1.0, "delta": 1e-5} | wrong))
    plan = shuffled_sum(100, 2, bound=1.0, eps=1.0, delta=1e-3)
    with pytest.raises(UsageError, match="be of 100 users"):
        plan.total([torch.zeros(2)] * 99)
    with pytest.raises(UsageError, match="users"):
        private_sgd(torch.zeros(2), [0] * 99, lambda at, user: at, plan=plan, rate=0.1)
    with pytest.raises(UsageError, match="users"):
        private_sgd(torch.zeros(3), [0] * 200, lambda at, user: at, plan=plan, rate=0.1)
