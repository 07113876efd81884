"""Marking: give up at random what was not asked for in this phase."""

from collections.abc import Sequence

import numpy as np

from turnout.solve.replacement.faults import Faults, checked

__all__ = ["Marks", "marking"]


class Marks:
    """A cache of single pages under the marking rule; ``follow`` keeps one beside its own.

    Args:
        capacity: how many pages are held.
        chance: where the choices come from.

    Source: Fiat et al., 1991, "Competitive Paging Algorithms".
    """

    def __init__(self, capacity: int, chance: np.random.Generator) -> None:
        self.capacity, self.chance = capacity, chance
        self.held: set[int] = set()
        self.marked: set[int] = set()

    def ask(self, page: int) -> bool:
        """Serves a request; whether it was a fault."""
        missing = page not in self.held
        if missing:
            if len(self.held) >= self.capacity:
                if self.held <= self.marked:
                    self.marked = set()
                self.held.remove(int(self.chance.choice(sorted(self.held - self.marked))))
            self.held.add(page)
        self.marked.add(page)
        return missing


def marking(requests: Sequence[int], *, capacity: int, seed: int) -> Faults:
    """A cache that gives up, at random, a page without a mark; being asked for marks, until all are marked.

    In expectation at most 2 H_k times the optimum, H_k = 1 + 1/2 + ... + 1/k.

    Args:
        requests: the page of each request.
        capacity: k, how many pages are held.
        seed: of the choices.

    Returns:
        The pages fetched for each request, 0 or 1.

    Raises:
        UsageError: a capacity below 1.

    >>> marking([0, 1, 2, 0, 1, 2], capacity=3, seed=0).count
    3

    Source: Fiat et al., 1991, "Competitive Paging Algorithms".
    """
    checked([[page] for page in requests], capacity, "turnout.solve.replacement.marking")
    cache = Marks(capacity, np.random.default_rng(seed))
    return Faults(tuple(int(cache.ask(page)) for page in requests))
