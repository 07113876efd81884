"""Faults: what a replay of requests through a cache fetched, and how often it asked for advice."""

import dataclasses
from collections.abc import Sequence

from turnout.errors import UsageError, word

__all__ = ["Faults", "checked"]


@dataclasses.dataclass(frozen=True)
class Faults:
    """What a replay cost.

    Args:
        fetched: for each request, how many pages had to be fetched for it.
        asked: how often a predictor was asked.

    >>> Faults((1, 0, 2)).count
    3

    Source: none; plain bookkeeping.
    """

    fetched: tuple[int, ...]
    asked: int = 0

    @property
    def count(self) -> int:
        """Pages fetched over all requests."""
        return sum(self.fetched)


def checked(requests: Sequence[Sequence[int]], capacity: int, where: str) -> list[tuple[int, ...]]:
    """The requests, each page of each once, in order.

    Raises:
        UsageError: a request that does not fit.
    """
    found = [tuple(dict.fromkeys(request)) for request in requests]
    most = max(map(len, found), default=0)
    if capacity < max(most, 1):
        fix = f"pass capacity={max(most, 1)}"
        raise UsageError(word("capacity", got=capacity, allowed="hold the largest request", where=where, fix=fix))
    return found
