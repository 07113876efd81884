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


def _measure(seed: int) -> Values:
    rng = np.random.default_rng(seed)
    page_T = _requests(rng)
    sets = [[page] for page in page_T]
    best, states = belady(sets, capacity=_CAPACITY).count, belady_states(sets, capacity=_CAPACITY)
    values = {
        "optimum": 1.0,
        "lru": lru(sets, capacity=_CAPACITY).count / best,
        "marking": marking(page_T, capacity=_CAPACITY, seed=seed).count / best,
    }
    for every in (1, 2, 4, 16):
        for name, wrong in (("", 0.0), (" wrong", 0.3), (" all wrong", 1.0)):
            ask = _told(states, wrong, page_T, rng)
            found = follow(page_T, capacity=_CAPACITY, ask=ask, every=every, seed=seed)
            values[f"every {every}{name}"] = found.count / best
            values |= {f"asked {every}": found.asked / _REQUESTS} if not wrong else {}
    return values | {"over": values["every 1"] - 1, "lru over": values["lru"] - 1}


def few_predictions() -> Claim:
    """Follow with a robust fallback, against the marking rule, which asks nobody.

    >>> few_predictions().off
    'the marking rule, without predictions'

    Source: Sadek and Elias, 2024, "Algorithms for Caching and MTS with reduced number of predictions".
    """
    why = "a tenth of the marking rule's own faults over the optimum's"
    return Claim(
        name="few_predictions",
        statement="Told what a perfect predictor would hold, a cache is optimal; told seldom, it is worse the more "
        "seldom, and still better than without; told nonsense, it is no worse than the marking rule.",
        source='Sadek and Elias, 2024, "Algorithms for Caching and MTS with reduced number of predictions"',
        off="the marking rule, without predictions",
        switched=dict.fromkeys(("every 2", "every 4", "every 16", "every 1 wrong", "every 1 all wrong"), "marking")
        | {"over": "lru over"},
        rows=(
            Row("faults beyond the optimum's, over them, told at every fault", "within", "over", "lru over", "LRU",
                bound=1e-12),
            Row(f"{_FAULTS}, told at every 2nd fault", "below", "every 2", "marking", "marking"),
            Row(f"{_FAULTS}, told at every 4th fault", "below", "every 4", "marking", "marking"),
            Row(f"{_FAULTS}, told at every 16th fault", "below", "every 16", "marking", "marking"),
            Row(f"{_FAULTS}, 30 % of it at random", "below", "every 1 wrong", "marking", "marking"),
            Row(f"{_FAULTS}, all of it at random", "no_worse", "every 1 all wrong", "marking", "marking",
                margin=0.187, why=why),
            Row(f"{_FAULTS}, 2nd against 4th", "below", "every 2", "every 4", "half as often", headline=True),
            Row(f"{_FAULTS}, 4th against 16th", "below", "every 4", "every 16", "a quarter as often", headline=True),
        ),
        measure=_measure,
        seconds=2,
        note="cache of 10 of 30 pages, 4,000 requests; least recently used {lru:.2f}, marking {marking:.2f} of the "
        "optimum's faults; asked at every, every 2nd, 4th, 16th fault: {every 1:.2f}, {every 2:.2f}, {every 4:.2f}, "
        "{every 16:.2f}, which is at {asked 1:.3f}, {asked 2:.3f}, {asked 4:.3f}, {asked 16:.3f} of the requests",
    )  # fmt: skip
