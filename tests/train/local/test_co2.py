"""CO2: LocalSGD when nothing is stale, its recurrence by hand when something is, and its time-line."""

import pytest
import torch

from tests.train.local.fleet import batches, data_parallel, flat, fleet, step, walk
from turnout.errors import UsageError
from turnout.train.local import CO2, overlap


def local_sgd(replicas: int, every: int, rounds: int) -> torch.Tensor:
    models, inner = fleet(replicas)
    data = [batches(every * rounds, at) for at in range(replicas)]
    for _ in range(rounds):
        for one, optimizer, mine in zip(models, inner, data, strict=True):
            for _ in range(every):
                step(one, optimizer, next(mine))
        mean = torch.stack([flat(one) for one in models]).mean(0)
        for one in models:
            torch.nn.utils.vector_to_parameters(mean.clone(), one.parameters())
    return flat(models[0])


@pytest.mark.parametrize("every", [1, 3])
def test_nothing_stale_is_local_sgd(every):
    models, inner = fleet(3)
    with CO2(models, inner, every=every, staleness=0, momentum=0.0, clip=None) as run:
        walk(models, inner, 4 * every)
    assert (flat(models[0]) - local_sgd(3, every, 4)).abs().max() <= 1e-12
    assert set(run.penalties) == {1.0} and run.rounds == 4
    if every == 1:
        assert (flat(models[0]) - data_parallel(3, 4)).abs().max() <= 1e-12


@pytest.mark.parametrize("penalty", [False, True])
def test_the_recurrence_by_hand(penalty):
    every, rounds, beta, alpha, clip = 2, 5, 0.4, 0.8, 0.01
    models, inner = fleet(2)
    with CO2(models, inner, every=every, momentum=beta, rate=alpha, penalty=penalty, clip=clip) as run:
        walk(models, inner, every * rounds)
    alone, own = fleet(2)
    data = [batches(every * rounds, at) for at in range(2)]
    start, momentum = [flat(alone[0])], torch.zeros_like(flat(alone[0]))
    means, moves, penalties, clipped = [], [], [], 0
    for t in range(rounds):
        for one, optimizer, mine in zip(alone, own, data, strict=True):
            torch.nn.utils.vector_to_parameters(start[t].clone(), one.parameters())
            for _ in range(every):
                step(one, optimizer, next(mine))
        means.append((flat(alone[0]) + flat(alone[1])) / 2)
        if t == 0:
            start.append(start[0].clone())
            continue
        gap = float((start[t] - start[t - 1]).norm())
        usual = sum(moves) / len(moves) if moves else 0.0
        penalties.append(1 + gap / usual if penalty and usual else 1.0)
        momentum = beta * momentum + (start[t - 1] - means[t - 1]) / penalties[-1]
        clipped += int((momentum.abs() > clip).sum())
        momentum = momentum.clamp(-clip, clip)
        start.append(start[t] - alpha * momentum)
        moves.append(float((start[t + 1] - start[t]).norm()))
    assert clipped and run.penalties == pytest.approx(penalties)
    assert (flat(models[0]) - start[-1]).abs().max() <= 1e-12


def test_an_average_is_asked_for_a_round_after_it_was_begun():
    models, inner = fleet(1)
    seen = []

    def average(mine_N, *, bits):
        number = sum(what == "begin" for what, _ in seen)
        seen.append(("begin", number))
        return lambda: seen.append(("wait", number)) or mine_N

    with CO2(models, inner, every=2, average=average):
        walk(models, inner, 6)
    assert seen == [("begin", 0), ("begin", 1), ("wait", 0), ("begin", 2), ("wait", 1)]


@pytest.mark.parametrize("average_s", [0.0, 1.0, 3.9, 4.0, 5.5, 20.0])
@pytest.mark.parametrize("staleness", [0, 1])
def test_what_is_exposed_is_what_steps_do_not_cover(average_s, staleness):
    seen = overlap(rounds=9, every=4, step_s=1.0, average_s=average_s, staleness=staleness)
    each = max(0.0, average_s - 4.0) if staleness else average_s
    assert seen.exposed_s == pytest.approx((9 - staleness) * each)
    assert seen.total_s == pytest.approx(9 * 4.0 + seen.exposed_s)


@pytest.mark.parametrize(
    "settings", [{"every": 0}, {"staleness": 2}, {"rate": 0.0}, {"momentum": 1.0}, {"clip": 0.0}, {"clip": -1.0}]
)
def test_settings_out_of_range_are_refused(settings):
    models, inner = fleet(1)
    with pytest.raises(UsageError, match=next(iter(settings))):
        CO2(models, inner, **({"every": 2} | settings))
    with pytest.raises(UsageError, match="the rounds"):
        overlap(rounds=0, every=1, step_s=1.0, average_s=1.0)
