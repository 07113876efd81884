"""Frequency x recency: uses count less the longer ago they are."""

import functools

import numpy as np

from turnout.decide.device.cache.history import History, Worth, by_worth
from turnout.errors import UsageError, word
from turnout.types.expert_cache import Seen

__all__ = ["LFRU"]


@functools.cache
def _rule(keep: float) -> Worth:
    """The same function for the same half-life, so that it is compiled once."""

    def worth(seen: Seen) -> np.ndarray:
        return seen.count_P * keep ** (seen.tick - seen.last_P)

    return worth


class LFRU:
    """Gives up the expert whose uses, each halved in weight every so many passes, weigh least.

    w = sum over uses of 2^(-age / half): ``half`` towards 0 is LRU, towards infinity LFU.

    Args:
        half: passes after which a use counts half.
        layers: L, which turns passes into accesses.

    Raises:
        UsageError: a half-life that is not above 0.

    >>> from turnout.types import Access, CacheShape
    >>> policy = LFRU(half=1.0, layers=1)
    >>> state = policy.init(CacheShape(1, 4, 2))
    >>> for step, experts in enumerate([(0,), (0,), (1,), (1,), (1,)]):
    ...     state, _ = policy.update(state, Access(0, experts, step))
    >>> policy.update(state, Access(0, (3,), step=5))[1].evict
    ((0, 0),)

    Source: Lee et al., 2001, "LRFU: A Spectrum of Policies that Subsumes the Least Recently Used and Least Frequently
    Used Policies". Servers of experts name it LFRU; their formulas are not published.
    """

    init = staticmethod(History.empty)
    update = by_worth

    def __init__(self, *, half: float = 16.0, layers: int) -> None:
        if not half > 0:
            raise UsageError(word("half", got=half, allowed="be above 0", where="LFRU", fix="pass half=16"))
        self.keep = 2.0 ** (-1.0 / (half * layers))
        self.worth = _rule(self.keep)
