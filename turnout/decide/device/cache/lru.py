"""Least recently used."""

import numpy as np

from turnout.decide.device.cache.history import History
from turnout.types.expert_cache import Access, CacheShape, Decision

__all__ = ["LRU"]


class LRU:
    """Gives up the expert that was used longest ago.

    With one pool for all layers that is the very expert whose layer comes next: a pool smaller than what one pass asks
    for hits nothing.

    >>> policy = LRU()
    >>> state, _ = policy.update(policy.init(CacheShape(1, 4, 2)), Access(0, (0, 1), step=0))
    >>> policy.update(state, Access(0, (1, 2), step=1))[1]
    Decision(evict=((0, 0),), fetch=((0, 2),), prefetch=())

    Source: Eliseev and Mazur, 2023, "Fast Inference of Mixture-of-Experts Language Models with Offloading", with a pool
    for each layer.
    """

    keep = 1.0

    def init(self, sizes: CacheShape) -> History:
        """Nothing is held."""
        return History.empty(sizes)

    def update(self, state: History, access: Access) -> tuple[History, Decision]:
        """Fetches what is missing; nothing before its time."""
        now = state.touched(access)
        return now.served(access, now.worths(self.worth, access.layer))

    @staticmethod
    def worth(
        last_P: np.ndarray,
        count_P: np.ndarray,
        told_P: np.ndarray,
        until_P: np.ndarray,
        left: int,
        tick: int,
        began: int,
    ) -> np.ndarray:
        """When each was used last."""
        return last_P * 1.0
