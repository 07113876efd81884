"""Belady's rule: give up what is needed again last; no cache fetches less, whatever it fetches when."""

import bisect
import heapq
from collections.abc import Sequence

from turnout.solve.replacement.faults import Faults, checked

__all__ = ["belady", "belady_states", "prefix_optima"]

_NEVER = 1 << 62


def belady(requests: Sequence[Sequence[int]], *, capacity: int) -> Faults:
    """The fewest fetches that any cache of this size needs, where each request is a set that is needed all at once.

    Rule: at a request S, what is missing of S is fetched; what is given up for it is, among the pages outside S, always
    the one whose next request comes last.

    It is optimal. Write each set S = {a, b, ...} as the sequence a b ... a b ... of its pages, twice over. (1) A cache
    that serves the sets serves that sequence at the same cost: it holds S throughout. (2) Belady's rule on the
    sequence, which is optimal for single pages, never gives up a page of S during the first round, because each of
    those is needed again within the block and every other page later, and S fits; so after the first round it holds S
    whole, and fetches nothing in the second. It has then served the set, at the cost of the sequence. By (1) no cache
    of sets costs less than the sequence's optimum, and by (2) this one costs just that. Fetching before the time does
    not help: each early fetch can be put off until its page is needed, without another fetch (Belady's own argument).
    So it bounds the pages that any policy moves, prefetching or not; it does not bound how few of them are waited for.

    Args:
        requests: the pages of each request; one page each is the classic problem.
        capacity: how many pages are held.

    Returns:
        The pages fetched for each request, from an empty cache.

    Raises:
        UsageError: a request larger than the capacity.

    >>> belady([[0], [1], [2], [0], [1], [2]], capacity=2).count
    4
    >>> belady([[0, 1], [1, 2], [0, 1]], capacity=2).fetched
    (2, 1, 1)

    Source: Belady, 1966, "A Study of Replacement Algorithms for a Virtual-Storage Computer"; the sets are our own.
    """
    return _replay(checked(requests, capacity, "turnout.solve.replacement.belady"), capacity, None)


def belady_states(requests: Sequence[Sequence[int]], *, capacity: int) -> tuple[frozenset[int], ...]:
    """What Belady's cache holds after each request: the answers of a perfect predictor.

    Args:
        requests: as ``belady`` takes them.
        capacity: see there.

    Returns:
        A set for each request.

    Raises:
        UsageError: a request larger than the capacity.

    >>> belady_states([[0], [1], [2]], capacity=2)[1] == {0, 1}
    True

    Source: Antoniadis et al., 2020, "Online Metric Algorithms with Untrusted Predictions": action predictions.
    """
    states: list[frozenset[int]] = []
    _replay(checked(requests, capacity, "turnout.solve.replacement.belady_states"), capacity, states)
    return tuple(states)


def _replay(sets: list[tuple[int, ...]], capacity: int, states: list[frozenset[int]] | None) -> Faults:
    uses: dict[int, list[int]] = {}
    for at, pages in enumerate(sets):
        for page in pages:
            uses.setdefault(page, []).append(at)
    following = {page: iter([*times[1:], _NEVER]) for page, times in uses.items()}
    held: dict[int, int] = {}  # page -> when it is needed next
    heap: list[tuple[int, int]] = []  # (-next, page); entries of pages used or given up since are stale
    fetched = []
    for pages in sets:
        missing = sum(page not in held for page in pages)
        fetched.append(missing)
        now = {page: held.pop(page, None) for page in pages}  # what is asked for is not given up
        while len(held) + len(pages) > capacity:
            when, page = heapq.heappop(heap)
            if held.get(page) == -when:
                del held[page]
        for page in now:
            held[page] = next(following[page])
            heapq.heappush(heap, (-held[page], page))
        if states is not None:
            states.append(frozenset(held))
    return Faults(tuple(fetched))


def prefix_optima(requests: Sequence[int], *, capacity: int) -> tuple[int, ...]:
    """The fewest fetches for each beginning of a sequence of single pages, found as it goes on.

    A page that is asked for again need not be fetched where a place was free for it ever since; a place is free
    at a time when fewer than ``capacity - 1`` pages are kept across it, since one is taken by that time's own request.
    Taking each such stay as soon as it ends is the largest set of stays that fit.

    Args:
        requests: the page of each request.
        capacity: how many pages are held.

    Returns:
        For each request the optimum of all up to it.

    Raises:
        UsageError: a capacity below 1.

    >>> prefix_optima([0, 1, 2, 0, 1, 2], capacity=2)
    (1, 2, 3, 3, 4, 4)

    Source: Jain and Lin, 2016, "Back to the Future: Leveraging Belady's Algorithm for Improved Cache Replacement".
    """
    checked([[page] for page in requests], capacity, "turnout.solve.replacement.prefix_optima")
    last: dict[int, int] = {}
    kept = [0] * len(requests)
    full: list[int] = []  # the times across which no more can be kept, ascending
    cost, optima = 0, []
    for at, page in enumerate(requests):
        since = last.get(page)
        crossed = bisect.bisect_right(full, since) < len(full) if since is not None else True
        if since is None or crossed or (capacity == 1 and at - since > 1):
            cost += 1
        else:
            for time in range(since + 1, at):
                kept[time] += 1
                if kept[time] == capacity - 1:
                    bisect.insort(full, time)
        last[page] = at
        optima.append(cost)
    return tuple(optima)
