"""Follow, and a robust fallback: caching by few predictions of what should be held."""

from collections.abc import Callable, Collection, Sequence

import numpy as np

from turnout.errors import UsageError, word
from turnout.solve.replacement.faults import Faults, checked
from turnout.solve.replacement.marking import Marks

__all__ = ["follow"]

_WHERE = "turnout.solve.replacement.follow"


def follow(
    requests: Sequence[int],
    *,
    capacity: int,
    ask: Callable[[int], Collection[int]],
    every: int = 1,
    robust: bool = True,
    seed: int,
) -> Faults:
    """A cache that gives up what a predictor would not hold, and asks it seldom.

    A prediction is a whole state: the pages that should be held now. At a fault whose page the last prediction has not,
    and at least ``every`` faults after the last question, the predictor is asked. What is given up is at random one
    of the pages outside the last prediction. Where none is left, or where faults exceed twice those of the marking
    rule on the same requests and 2 k more, it is a page without a mark, as that rule has it.

    Consistent: perfect predictions and ``every=1`` give the optimum, with as many questions as the optimum has faults:
    until it faults its state stays as it was told. Robust: from 2 M + 2 k faults on, M the marking rule's, this marks
    itself, so that it is within a constant of M + k, and M is at most 2 H_k times the optimum in expectation. Smooth:
    while it follows, each fault beyond the optimum's is due to a page on which prediction and optimum differ.

    Args:
        requests: the page of each request.
        capacity: k, how many pages are held.
        ask: the pages that should be held after the request of this number; it is not told of later ones.
        every: how many faults lie between questions, at least 1.
        robust: whether it falls back; without, it follows whatever it is told.
        seed: of the choices.

    Returns:
        The pages fetched for each request, 0 or 1, and how often it asked.

    Raises:
        UsageError: a capacity or a distance below 1.

    >>> from turnout.solve.replacement import belady, belady_states
    >>> requests = [0, 1, 2, 0, 1, 2, 3, 0]
    >>> state = belady_states([[page] for page in requests], capacity=2)
    >>> found = follow(requests, capacity=2, ask=lambda at: state[at], seed=0)
    >>> found.count == belady([[page] for page in requests], capacity=2).count == found.asked
    True

    Source: Sadek and Elias, 2024, "Algorithms for Caching and MTS with reduced number of predictions". Theirs falls
    back where it costs more than the optimum of what came so far, for one phase, and asks in it at growing distances;
    we compare with the marking rule, which needs no optimum.
    """
    checked([[page] for page in requests], capacity, _WHERE)
    if every < 1:
        raise UsageError(word("every", got=every, allowed="be at least 1", where=_WHERE, fix="pass every=1"))
    return _replay(requests, capacity, ask, every, robust, np.random.default_rng(seed))


def _replay(
    requests: Sequence[int],
    capacity: int,
    ask: Callable[[int], Collection[int]],
    every: int,
    robust: bool,
    chance: np.random.Generator,
) -> Faults:
    shadow, own = Marks(capacity, chance), Marks(capacity, chance)
    told: frozenset[int] | None = None
    fetched, since, asked, faults, marked = [], every, 0, 0, 0
    for at, page in enumerate(requests):
        marked += shadow.ask(page)
        if page in own.held:
            own.marked.add(page)
            fetched.append(0)
            continue
        faults, since = faults + 1, since + 1
        if since >= every and (told is None or page not in told):
            told, since, asked = frozenset(ask(at)), 0, asked + 1
        astray = robust and faults > 2 * marked + 2 * capacity
        spare = sorted(own.held - told) if told is not None and not astray else []
        if len(own.held) >= capacity and spare:
            own.held.remove(int(chance.choice(spare)))
        own.ask(page)
        fetched.append(1)
    return Faults(tuple(fetched), asked)
