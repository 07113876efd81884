"""AGVM: planted variances are recovered, and only the factors tell its steps from the optimizer's."""

import copy
import math

import pytest
import torch
from torch import nn

from tests.processes import spawn
from turnout.errors import ShapeError, UsageError
from turnout.train import AGVM
from turnout.train.agvm import over_halves


def modules(sizes=(400, 400, 400)) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(size)) for size in sizes]


def groups(parameters):
    return [{"params": [one]} for one in parameters]


@pytest.mark.parametrize("noises", [(0.5, 1.0, 2.0), (1.0, 0.4, 1.5)])
def test_planted_variances_are_recovered(noises):
    """With a gradient of length 1 and noise of variance v on either half, the cosine is 1 / (1 + v)."""
    chance = torch.Generator().manual_seed(0)
    parameters = modules((40_000,) * 3)
    agvm = AGVM(torch.optim.SGD(groups(parameters), lr=0.1), momentum=0.0)
    mean = torch.randn(40_000, generator=chance)
    halves = [[mean + v**0.5 * torch.randn(40_000, generator=chance) for v in noises] for _ in range(2)]
    factors = agvm.look(*halves)
    phi = [1 - 1 / (1 + v) for v in noises]
    assert agvm.phi == pytest.approx(phi, abs=0.02)
    assert factors == pytest.approx([math.sqrt(min(10.0, max(0.5, phi[0] / one))) for one in phi], rel=0.05)
    assert factors[0] == 1.0


def test_factors_move_by_their_momentum_and_stay_in_limits():
    one, other = modules((2, 2))
    agvm = AGVM(torch.optim.SGD(groups([one, other]), lr=0.1), momentum=0.9)
    ex, ey = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert agvm.look([ex, ex], [ex, ey]) == pytest.approx([1.0, 0.9 + 0.1 * math.sqrt(0.5)])
    assert agvm.look([ex, ex], [ey, ex])[1] == pytest.approx(0.9 * (0.9 + 0.1 * math.sqrt(0.5)) + 0.1 * math.sqrt(10))


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_step_is_the_optimizers_with_each_rate_times_its_factor(kind):
    torch.manual_seed(0)
    mine = [nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))]
    theirs = copy.deepcopy(mine)
    agvm = AGVM(kind(groups(mine), lr=0.1), begin=2, every=3)
    agvm.factors = [1.0, 0.5]
    seen = []
    for step in range(6):
        gradients = [torch.randn(3) for _ in mine]
        for a, b, g in zip(mine, theirs, gradients, strict=True):
            a.grad, b.grad = g.clone(), g.clone()
        if step == 0:
            plain = kind(groups(theirs), lr=0.1)
        plain.param_groups[1]["lr"] = 0.1 * (0.5 if step >= 2 else 1.0)
        plain.step()
        seen.append(agvm.looks)
        agvm.step()
    assert seen == [False, False, True, False, False, True]
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))
    assert [group["lr"] for group in agvm.optimizer.param_groups] == [0.1, 0.1]


def test_adams_gradients_are_scaled_as_its_step_will():
    """Entries of unlike size count alike: without it the large entry alone would tell the angle."""
    one, other = modules((2, 2))
    optimizer = torch.optim.Adam(groups([one, other]), lr=0.0)
    for parameter in (one, other):
        parameter.grad = torch.tensor([100.0, 0.01])
    optimizer.step()
    agvm = AGVM(optimizer, momentum=0.0)
    agvm.look([torch.tensor([100.0, 0.01])] * 2, [torch.tensor([100.0, 0.01]), torch.tensor([100.0, -0.01])])
    assert agvm.phi == pytest.approx([0.0, 1.0], abs=1e-3)


def test_what_does_not_fit_is_refused():
    one, other = modules((2, 2))
    with pytest.raises(UsageError, match="group a module"):
        AGVM(torch.optim.SGD([one, other], lr=0.1))
    for wrong in ({"every": 0}, {"begin": -1}, {"momentum": 1.0}):
        with pytest.raises(UsageError, match="every, begin and momentum"):
            AGVM(torch.optim.SGD(groups([one, other]), lr=0.1), **wrong)
    agvm = AGVM(torch.optim.SGD(groups([one, other]), lr=0.1))
    g = torch.ones(2)
    for first, second in (([g], [g]), ([g, g], [g, None]), ([g, torch.ones(3)], [g, torch.ones(3)])):
        with pytest.raises(ShapeError, match="the gradients"):
            agvm.look(first, second)
    assert agvm.look([g, None], [g, None])[0] == 1.0


def one_rank(ranks) -> tuple[list, list]:
    halves = over_halves([torch.full((2,), 10.0**ranks.rank), None])
    return tuple([None if one is None else one.tolist() for one in half] for half in halves)


@pytest.mark.slow
def test_halves_of_ranks_are_summed_apart_and_alike_on_all():
    """Of three ranks the first is a half, and the other two."""
    assert spawn(3, one_rank) == [([[1.0, 1.0], None], [[110.0, 110.0], None])] * 3
