"""Caching by few predictions: asked at every fault or at every sixteenth, right or wrong."""

from collections.abc import Sequence

import numpy as np

from turnout.claims.claim import Claim, Row, Values
from turnout.solve import belady, belady_states, follow, lru, marking

__all__ = ["few_predictions"]

_PAGES, _CAPACITY, _REQUESTS = 30, 10, 4000
_FAULTS = "faults over the optimum's"


def _requests(rng: np.random.Generator) -> list[int]:
    """Loops of 14 pages, which a cache of 10 does not hold, between draws from a Zipf distribution."""
    share = 1 / np.arange(1, _PAGES + 1) ** 0.8
    found: list[int] = []
    while len(found) < _REQUESTS:
        loop = rng.permutation(_PAGES)[:14]
        found += [*np.tile(loop, 2).tolist(), *rng.choice(_PAGES, 20, p=share / share.sum()).tolist()]
    return found[:_REQUESTS]


def _told(states: Sequence[frozenset[int]], wrong: float, page_T: Sequence[int], rng: np.random.Generator):
    """What the optimum holds; at this rate a state drawn at random, with the page that is asked for."""

    def ask(at: int) -> frozenset[int]:
        if rng.random() < wrong:
            return frozenset(rng.choice(_PAGES, _CAPACITY, replace=False).tolist()) | {page_T[at]}
        return states[at]

    return ask


def _worst(page_T: Sequence[int]):
    """What whoever wishes the cache ill tells it: the pages that are asked for last, with the one asked for now."""
    at_P = [np.nonzero(np.equal(page_T, page))[0] for page in range(_PAGES)]

    def ask(now: int) -> frozenset[int]:
        next_P = [next(iter(at_T[np.searchsorted(at_T, now + 1) :].tolist()), len(page_T)) for at_T in at_P]
        return frozenset(np.argsort(next_P, kind="stable")[-_CAPACITY:].tolist()) | {page_T[now]}

    return ask


def _measure(seed: int) -> Values:
    rng = np.random.default_rng(seed)
    page_T = _requests(rng)
    sets = [[page] for page in page_T]
    best, states = belady(sets, capacity=_CAPACITY).count, belady_states(sets, capacity=_CAPACITY)
    values = {
        "lru": lru(sets, capacity=_CAPACITY).count / best,
        "marking": marking(page_T, capacity=_CAPACITY, seed=seed).count / best,
    }
    for every in (1, 2, 4, 16):
        for name, wrong in (("", 0.0), (" wrong", 0.3), (" at random", 1.0)):
            ask = _told(states, wrong, page_T, rng)
            found = follow(page_T, capacity=_CAPACITY, ask=ask, every=every, seed=seed)
            values[f"every {every}{name}"] = found.count / best
            values |= {f"asked {every}": found.asked / _REQUESTS} if not wrong else {}
    values |= {"over": values["every 1"] - 1, "over at random": values["every 1 at random"] - 1}
    return values | _misled(rng, seed)


def _misled(rng: np.random.Generator, seed: int) -> dict[str, float]:
    """Faults over the marking rule's where it is told the worst, on requests that are easy to serve."""
    share = 1 / np.arange(1, _PAGES + 1) ** 1.5
    page_T = rng.choice(_PAGES, _REQUESTS, p=share / share.sum()).tolist()
    marked, ask = marking(page_T, capacity=_CAPACITY, seed=seed).count, _worst(page_T)
    found = {}
    for name, robust in (("misled", True), ("misled, blind", False)):
        found[name] = follow(page_T, capacity=_CAPACITY, ask=ask, robust=robust, seed=seed).count / marked
    return found


def few_predictions() -> Claim:
    """Follow with a robust fallback: told the truth, told states at random, and told the worst.

    >>> few_predictions().off
    'states at random are told instead; no fallback'

    Source: Sadek and Elias, 2024, "Algorithms for Caching and MTS with reduced number of predictions".
    """
    why = "a tenth of the marking rule's own faults over the optimum's"
    random = "states at random, asked for as often"
    return Claim(
        name="few_predictions",
        statement="Told what a perfect predictor would hold, a cache is optimal; told seldom, it is worse the more "
        "seldom, and still better than told nonsense; nonsense does no harm beside the marking rule, and the worst "
        "does little more than half of what it does without the fallback.",
        source='Sadek and Elias, 2024, "Algorithms for Caching and MTS with reduced number of predictions"',
        off="states at random are told instead; no fallback",
        switched={f"every {each}": f"every {each} at random" for each in (2, 4, 16)}
        | {"every 1 wrong": "every 1 at random", "over": "over at random", "misled": "misled, blind"},
        rows=(
            Row("faults beyond the optimum's, over them, told at every fault", "within", "over", "over at random",
                random, bound=1e-12),
            Row(f"{_FAULTS}, told at every 2nd fault", "below", "every 2", "every 2 at random", random),
            Row(f"{_FAULTS}, told at every 4th fault", "below", "every 4", "every 4 at random", random),
            Row(f"{_FAULTS}, told at every 16th fault", "below", "every 16", "every 16 at random", random),
            Row(f"{_FAULTS}, 30 % of it at random", "below", "every 1 wrong", "every 1 at random", random),
            Row("faults over the marking rule's, told the worst", "below", "misled", "misled, blind", "no fallback"),
            Row(f"{_FAULTS}, told at every 16th fault", "below", "every 16", "marking", "marking", headline=True),
            Row(f"{_FAULTS}, all of it at random", "no_worse", "every 1 at random", "marking", "marking",
                margin=0.187, why=why, headline=True),
            Row(f"{_FAULTS}, 2nd against 4th", "below", "every 2", "every 4", "half as often", headline=True),
            Row(f"{_FAULTS}, 4th against 16th", "below", "every 4", "every 16", "a quarter as often", headline=True),
        ),
        measure=_measure,
        seconds=2,
        note="cache of 10 of 30 pages, 4,000 requests; least recently used {lru:.2f}, marking {marking:.2f}, states at "
        "random {every 1 at random:.2f} of the optimum's faults; asked at every, every 2nd, 4th, 16th fault: "
        "{every 1:.2f}, {every 2:.2f}, {every 4:.2f}, {every 16:.2f}, which is at {asked 1:.3f}, {asked 2:.3f}, "
        "{asked 4:.3f}, {asked 16:.3f} of the requests. Told the worst, of requests that a cache serves well, "
        "{misled:.2f} of the marking rule's faults, without the fallback {misled, blind:.2f}",
    )  # fmt: skip
