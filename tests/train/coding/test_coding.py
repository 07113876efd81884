"""Gradients decoded from what arrived are the sum over all data; loads are the paper's; nobody waits who need not."""

import itertools

import numpy as np
import pytest

from turnout.errors import ShapeError, UsageError
from turnout.train.coding import Coded, Multiplexed, SelectiveRepeat, gilbert_elliot, gradient_code, race

WIDTH = 5


def chunks(scheme, seed=0):
    """job -> the same made-up gradients, whoever asks."""
    return lambda job: np.random.default_rng([seed, job]).standard_normal((len(scheme.shares), WIDTH))


@pytest.mark.parametrize("workers, stragglers", [(4, 0), (4, 1), (6, 2), (5, 2), (7, 3), (6, 5), (9, 4)])
def test_any_n_less_s_answers_give_the_sum(workers, stragglers):
    code = gradient_code(workers, stragglers)
    gradient = np.random.default_rng(0).standard_normal((workers, WIDTH))
    assert all(len(code.parts(worker)) == stragglers + 1 for worker in range(workers))
    answers = {worker: code.encode(worker, gradient[code.parts(worker)]) for worker in range(workers)}
    for gone in itertools.combinations(range(workers), stragglers):
        there = {worker: one for worker, one in answers.items() if worker not in gone}
        assert np.abs(code.decode(there) - gradient.sum(0)).max() <= 1e-9
    few = {worker: one for worker, one in answers.items() if worker > stragglers}  # part s was theirs who are gone
    with pytest.raises(UsageError, match="the answers"):
        code.decode(few)


def test_a_code_that_rounding_spoils_is_refused():
    with pytest.raises(UsageError, match="the cyclic code"):
        gradient_code(256, 27)
    assert gradient_code(256, 15).load == 1 / 16


def test_loads_are_the_papers():
    assert Coded(256, 15).load == 0.0625
    assert Coded(256, 0).load == pytest.approx(0.0039, abs=5e-5)
    assert SelectiveRepeat(256, burst=2, window=3, stragglers=23).load == pytest.approx(0.0508, abs=5e-5)
    assert Multiplexed(256, burst=1, window=2, stragglers=27).load == pytest.approx(0.0075, abs=5e-5)


SCHEMES = {
    "gc": lambda: Coded(12, 3),
    "cyclic": lambda: Coded(10, 3),
    "sr": lambda: SelectiveRepeat(12, burst=2, window=5, stragglers=6),
    "sr, B=1": lambda: SelectiveRepeat(9, burst=1, window=3, stragglers=6),
    "m": lambda: Multiplexed(12, burst=1, window=2, stragglers=3),
    "m, B=2": lambda: Multiplexed(12, burst=2, window=4, stragglers=5),
    "m, cyclic": lambda: Multiplexed(10, burst=2, window=3, stragglers=3),
    "m, lambda=0": lambda: Multiplexed(5, burst=1, window=3, stragglers=0),
}


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("begin, end", [(0.03, 0.9), (0.1, 0.5), (0.3, 0.3), (0.9, 0.05)])
def test_every_job_is_told_in_time_and_exactly_whoever_straggles(name, begin, end):
    scheme, jobs = SCHEMES[name](), 25
    late = gilbert_elliot(scheme.workers, jobs + scheme.delay, begin=begin, end=end, seed=3)
    seen = race(scheme, 1 + 8.0 * late, fixed_s=1.0, work_s=1.0)
    given = chunks(scheme)
    for job in range(jobs):
        whole = given(job).sum(0)
        assert np.abs(scheme.gradient(job, given) - whole).max() <= 1e-9, job
    assert scheme.shares.sum() == pytest.approx(1.0)
    if begin < 0.2 and name != "m, lambda=0":
        assert seen.missed > 0


@pytest.mark.parametrize("name", ["sr", "sr, B=1", "m", "m, B=2", "m, cyclic"])
@pytest.mark.parametrize("seed", range(5))
def test_patterns_of_the_papers_model_are_never_waited_for(name, seed):
    """In every W rounds at most lambda workers straggle, and each within B rounds on end."""
    burst, window, few = {
        "sr": (2, 5, 6), "sr, B=1": (1, 3, 6), "m": (1, 2, 3), "m, B=2": (2, 4, 5), "m, cyclic": (2, 3, 3),
    }[name]  # fmt: skip
    scheme, rounds = SCHEMES[name](), 40
    chance, late = np.random.default_rng(seed), np.zeros((40, SCHEMES[name]().workers), dtype=bool)
    for at in range(rounds):
        for worker in chance.permutation(scheme.workers):
            trial = late.copy()
            trial[at, worker] = True
            inside = trial[max(0, at + 1 - window) : at + 1]
            if inside.any(0).sum() <= few and not trial[max(0, at + 1 - window) : max(0, at + 1 - burst), worker].any():
                late = trial
    seen = race(scheme, 1 + 8.0 * late, fixed_s=1.0, work_s=1.0)
    assert late.sum() > rounds and seen.waited == 0 and seen.missed == late.sum(), f"seed {seed}"


def test_the_work_of_a_round_is_the_load():
    """Own chunks, repeats and combinations of small chunks all cost a worker the same."""
    scheme = Multiplexed(12, burst=2, window=4, stragglers=5)
    own, small = scheme.shares[0], scheme.shares[-1]
    assert own == pytest.approx(6 * small)
    assert scheme.load == pytest.approx((scheme.own + scheme.burst) * own)


def test_a_job_that_is_not_due_is_not_told():
    scheme = Multiplexed(6, burst=1, window=2, stragglers=1)
    late = np.zeros(6, dtype=bool)
    late[2] = True
    scheme.take(late)
    with pytest.raises(UsageError, match="be due"):
        scheme.gradient(0, chunks(scheme))


def test_what_does_not_go_together_is_refused():
    with pytest.raises(UsageError, match="stragglers"):
        gradient_code(4, 4)
    with pytest.raises(UsageError, match="the scheme"):
        Multiplexed(4, burst=2, window=2, stragglers=1)
    with pytest.raises(UsageError, match="window"):
        SelectiveRepeat(8, burst=2, window=4, stragglers=1)
    with pytest.raises(UsageError, match="the chances"):
        gilbert_elliot(2, 2, begin=0.5, end=0.0, seed=0)
    with pytest.raises(ShapeError, match="slowdown_RW"):
        race(Coded(4, 1), np.ones((3, 5)), fixed_s=1.0, work_s=1.0)
