"""What a full cache gives up: the optimum by brute force, bounds of the online rules, and what few predictions give."""

import itertools
import math

import numpy as np
import pytest

from turnout.errors import UsageError
from turnout.solve import belady, belady_states, follow, lru, marking, prefix_optima


def sets(rng: np.random.Generator, pages: int, length: int, most: int) -> list[list[int]]:
    return [rng.choice(pages, rng.integers(1, most + 1), replace=False).tolist() for _ in range(length)]


def cheapest(requests: list[list[int]], capacity: int, pages: int, *, early: bool) -> int:
    """The least that any cache fetches, over all states; with ``early``, what is not asked for may be fetched too."""
    states = [frozenset(s) for n in range(capacity + 1) for s in itertools.combinations(range(pages), n)]
    cost = {frozenset[int](): 0}
    for request in requests:
        after: dict[frozenset[int], int] = {}
        for state, paid in cost.items():
            for new in states:
                if new.issuperset(request) and (early or new - state <= set(request)):
                    total = paid + len(new - state)
                    after[new] = min(after.get(new, total), total)
        cost = after
    return min(cost.values())


@pytest.mark.parametrize("seed", range(25))
def test_no_cache_of_sets_fetches_less_than_beladys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pages, capacity = int(rng.integers(3, 6)), int(rng.integers(1, 4))
    requests = sets(rng, pages, 7, min(capacity, pages))
    found = belady(requests, capacity=capacity)
    for early in (False, True):
        assert found.count == cheapest(requests, capacity, pages, early=early), f"seed {seed}"
    held = belady_states(requests, capacity=capacity)
    for state, request in zip(held, requests, strict=True):
        assert len(state) <= capacity and state.issuperset(request)
    before = [frozenset[int](), *held[:-1]]
    assert found.fetched == tuple(len(set(r) - b) for r, b in zip(requests, before, strict=True))


@pytest.mark.parametrize("seed", range(25))
def test_the_optimum_of_every_beginning(seed: int) -> None:
    rng = np.random.default_rng(seed)
    page_T, capacity = rng.integers(0, 6, 40).tolist(), int(rng.integers(1, 7))
    found = prefix_optima(page_T, capacity=capacity)
    for length in range(1, 41):
        assert found[length - 1] == belady([[page] for page in page_T[:length]], capacity=capacity).count, (
            f"seed {seed}"
        )


@pytest.mark.parametrize("seed", range(100))
def test_online_rules_are_within_their_bounds(seed: int) -> None:
    """Never below the optimum; least recently used at most k times it (from an empty cache)."""
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(1, 6))
    requests = sets(rng, 9, 60, 1)
    best = belady(requests, capacity=capacity).count
    page_T = [page for (page,) in requests]
    recent, marked = lru(requests, capacity=capacity).count, marking(page_T, capacity=capacity, seed=seed).count
    assert best <= recent <= capacity * best and best <= marked <= capacity * best, f"seed {seed}"


def test_larger_caches_that_give_up_the_least_recent_hold_what_smaller_ones_do() -> None:
    requests = sets(np.random.default_rng(0), 12, 300, 3)
    counts = [lru(requests, capacity=capacity).count for capacity in range(3, 13)]
    assert counts == sorted(counts, reverse=True) and counts[-1] == len({page for r in requests for page in r})


@pytest.mark.parametrize("seed", range(60))
def test_perfect_predictions_give_the_optimum_in_as_many_questions(seed: int) -> None:
    """1-consistent."""
    rng = np.random.default_rng(seed)
    capacity, page_T = int(rng.integers(1, 8)), rng.zipf(1.3, 120).clip(max=12).tolist()
    one = [[page] for page in page_T]
    best, state = belady(one, capacity=capacity).count, belady_states(one, capacity=capacity)
    found = follow(page_T, capacity=capacity, ask=lambda at: state[at], seed=seed)
    assert found.count == best and found.asked <= best, f"seed {seed}"


@pytest.mark.parametrize("seed", range(20))
def test_nonsense_costs_a_constant_times_marking(seed: int) -> None:
    """Robust: at most 2 M + 2 k, then marking itself, whose phases cost at most 2 H_k times the optimum's."""
    rng = np.random.default_rng(seed)
    capacity, page_T = 6, rng.integers(0, 9, 1500).tolist()
    one = [[page] for page in page_T]
    worst = belady_states([[(8 - page)] for page in page_T], capacity=capacity)  # keeps what is needed last
    found = follow(page_T, capacity=capacity, ask=lambda at: worst[at], seed=seed).count
    blind = follow(page_T, capacity=capacity, ask=lambda at: worst[at], seed=seed, robust=False).count
    marked = marking(page_T, capacity=capacity, seed=seed).count
    harmonic = sum(1 / n for n in range(1, capacity + 1))
    assert found <= 3 * marked + 2 * capacity and found <= blind + 2 * capacity + marked, f"seed {seed}"
    assert marked <= 2 * harmonic * belady(one, capacity=capacity).count * 1.2, f"seed {seed}"


def astray(state, page_T: list[int], rate: float):
    """A predictor that at this rate holds another page than the optimum; and on how many pages it differed."""
    chance, wrong = np.random.default_rng(2), [0]

    def ask(at: int) -> set[int]:
        told = set(state[at])
        if chance.random() < rate:
            spare = sorted(set(range(1, 21)) - told)
            told = {*sorted(told - {page_T[at]})[1:], page_T[at], int(chance.choice(spare))}
        wrong[0] += len(set(state[at]) - told)
        return told

    return ask, wrong


def test_it_grows_smoothly_with_errors_and_with_silence() -> None:
    """Each fault beyond the optimum's is paid for by a page on which what was told and the optimum differ."""
    rng = np.random.default_rng(1)
    page_T = rng.zipf(1.2, 3000).clip(max=20).tolist()
    one = [[page] for page in page_T]
    best, state = belady(one, capacity=6).count, belady_states(one, capacity=6)
    counts = []
    for rate in (0.0, 0.05, 0.2, 0.6):
        ask, wrong = astray(state, page_T, rate)
        counts.append(follow(page_T, capacity=6, ask=ask, seed=0).count)
        assert counts[-1] - best <= 3 * wrong[0], rate
    assert counts == sorted(counts)
    seldom = [follow(page_T, capacity=6, ask=lambda at: state[at], every=n, seed=0) for n in (1, 4, 16, 64)]
    assert [one.asked for one in seldom] == sorted([one.asked for one in seldom], reverse=True)
    assert [one.count for one in seldom] == sorted(one.count for one in seldom)


def test_the_same_seed_gives_the_same_faults() -> None:
    page_T = np.random.default_rng(0).integers(0, 9, 200).tolist()
    first, again = (follow(page_T, capacity=4, ask=lambda at: {page_T[at]}, seed=5) for _ in range(2))
    assert first == again and marking(page_T, capacity=4, seed=1) == marking(page_T, capacity=4, seed=1)
    assert math.isclose(sum(first.fetched), first.count)


@pytest.mark.parametrize("rule", [belady, lru, belady_states])
def test_a_request_larger_than_the_cache_is_refused(rule) -> None:
    with pytest.raises(UsageError, match="capacity=3"):
        rule([[0, 1, 2]], capacity=2)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="every=1"):
        follow([0], capacity=1, ask=lambda at: {0}, every=0, seed=0)
    with pytest.raises(UsageError, match="capacity=1"):
        marking([0], capacity=0, seed=0)
