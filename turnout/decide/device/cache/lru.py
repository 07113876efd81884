"""Least recently used."""

import numpy as np

from turnout.decide.device.cache.history import History, by_worth
from turnout.types.expert_cache import Seen

__all__ = ["LRU"]


class LRU:
    """Gives up the expert that was used longest ago.

    With one pool for all layers that is the very expert whose layer comes next: a pool smaller than what one pass asks
    for hits nothing.

    >>> from turnout.types import Access, CacheShape
    >>> policy = LRU()
    >>> state, _ = policy.update(policy.init(CacheShape(1, 4, 2)), Access(0, (0, 1), step=0))
    >>> policy.update(state, Access(0, (1, 2), step=1))[1]
    Decision(evict=((0, 0),), fetch=((0, 2),), prefetch=())

    Source: Eliseev and Mazur, 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading", with a pool
    for each layer.
    """

    keep = 1.0

    init = staticmethod(History.empty)
    update = by_worth

    @staticmethod
    def worth(seen: Seen) -> np.ndarray:
        """When each was used last."""
        return seen.last_P * 1.0
