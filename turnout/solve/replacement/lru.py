"""Least recently used."""

from collections.abc import Sequence

from turnout.solve.replacement.faults import Faults, checked

__all__ = ["lru"]


def lru(requests: Sequence[Sequence[int]], *, capacity: int) -> Faults:
    """A cache that gives up what was asked for longest ago; pages of one request count in their order.

    Its faults are at most ``capacity`` times the optimum's, which no deterministic online rule improves on.

    Args:
        requests: the pages of each request, needed all at once.
        capacity: how many pages are held.

    Returns:
        The pages fetched for each request.

    Raises:
        UsageError: a request larger than the capacity.

    >>> lru([[0], [1], [2], [0], [1], [2]], capacity=2).count
    6

    Source: Sleator and Tarjan, 1985, "Amortized Efficiency of List Update and Paging Rules".
    """
    held: dict[int, None] = {}  # the least recent first
    fetched = []
    for pages in checked(requests, capacity, "turnout.solve.replacement.lru"):
        fetched.append(sum(page not in held for page in pages))
        for page in pages:
            held.pop(page, None)
        while len(held) + len(pages) > capacity:
            del held[next(iter(held))]
        held.update(dict.fromkeys(pages))
    return Faults(tuple(fetched))
