"""Paging: what is fetched and what is given up, when the order in which things are used is known."""

import dataclasses
from collections.abc import Collection, Sequence

from turnout.errors import UsageError, word

__all__ = ["Turn", "paging"]

_WHERE = "turnout.solve.paging"


@dataclasses.dataclass(frozen=True)
class Turn:
    """What happens before one use.

    Args:
        drops: what is given up, in order.
        loads: what is fetched then, in order; the first of them may be what is used now.
        held: what there is room taken for afterwards.

    >>> Turn((), (0, 1), frozenset({0, 1})).loads
    (0, 1)

    Source: none; plain bookkeeping.
    """

    drops: tuple[int, ...]
    loads: tuple[int, ...]
    held: frozenset[int]


def paging(
    uses: Sequence[int],
    *,
    capacity: int,
    ahead: int,
    held: Collection[int] = (),
    spent: bool = False,
) -> tuple[Turn, ...]:
    """For each use the fetches that come before it; what is used again last is given up first.

    Args:
        uses: what is used, in order.
        capacity: how many are held at once.
        ahead: how many of the next uses are fetched before they come; less than the capacity.
        held: what is there to begin with.
        spent: whether a thing is worth nothing after its last use and given up at once, as weights that have had
            their gradient; otherwise the uses are taken to begin again.

    Returns:
        A turn for each use.

    Raises:
        UsageError: no room for what is used and fetched ahead.

    >>> [turn.loads for turn in paging([0, 1, 2, 2, 1, 0], capacity=2, ahead=1, spent=True)]
    [(0, 1), (2,), (), (), (0,), ()]

    Source: Belady, 1966, "A Study of Replacement Algorithms for a Virtual-Storage Computer".
    """
    if not 0 <= ahead < capacity:
        fix = f"pass ahead={max(0, capacity - 1)}, or a capacity of {ahead + 1}"
        got = f"{ahead} with a capacity of {capacity}"
        raise UsageError(word("ahead", got=got, allowed="be below the capacity", where=_WHERE, fix=fix))
    now, turns = list(dict.fromkeys(held)), []
    for at, used in enumerate(uses):
        drops: list[int] = []
        if spent and at and uses[at - 1] not in uses[at:]:
            drops.append(uses[at - 1])
            now.remove(uses[at - 1])
        loads = []
        wanted = dict.fromkeys(uses[at : at + 1 + ahead])
        for one in wanted:
            if one in now:
                continue
            while len(now) >= capacity:
                victim = max((each for each in now if each not in wanted), key=lambda each: _next(uses, at, each))
                now.remove(victim)
                drops.append(victim)
            now.append(one)
            loads.append(one)
        assert used in now, "what is used was wanted first"
        turns.append(Turn(tuple(drops), tuple(loads), frozenset(now)))
    return tuple(turns)


def _next(uses: Sequence[int], at: int, one: int) -> int:
    """How far away the next use is, the uses beginning again after the last."""
    count = len(uses)
    return next((step for step in range(count) if uses[(at + step) % count] == one), count)
