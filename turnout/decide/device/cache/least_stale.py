"""Least-Stale: experts whose turn has passed go first."""

import numpy as np

from turnout.decide.device.cache.history import History, by_worth
from turnout.types.expert_cache import Seen

__all__ = ["LeastStale"]


class LeastStale:
    """Gives up first what this pass has left behind: experts whose layer has had its turn and did not ask for them.

    Layers ask in a fixed order, so an expert of the layer that has just run is needed again after a whole pass, and one
    of the next layer at once, though it was used longest ago. The order in which experts are given up: those of layers
    that have had their turn in this pass and that were not used in it, the longest unused first; then those that were
    used in it, of the layer that has its next turn last; then those of layers still to come, by the whole passes for
    which they were not used, and of the layer that comes last. In pools of one layer each this is LRU.

    >>> from turnout.types import Access, CacheShape
    >>> policy = LeastStale()
    >>> state = policy.init(CacheShape(3, 4, 3, shared=True))
    >>> for layer in range(3):
    ...     state, _ = policy.update(state, Access(layer, (0,), step=0))
    >>> policy.update(state, Access(0, (0, 1), step=1))[1].evict  # LRU gives up expert 0 of layer 1, which comes next
    ((2, 0),)

    Source: Hoang et al., 2026, "SpecMD: A Comprehensive Study On Speculative Expert Prefetching". Its text could not be
    read in full: what counts as stale is our reading of its abstract.
    """

    keep = 1.0

    init = staticmethod(History.empty)
    update = by_worth

    @staticmethod
    def worth(seen: Seen) -> np.ndarray:
        """Three ranks, the lowest first, and within each its own order."""
        layers = seen.until_P.max()
        idle_P = (seen.tick - seen.last_P) // layers  # whole passes since
        passed_P = np.where(seen.last_P > seen.began, 1e15 - seen.until_P, seen.last_P * 1.0)
        return np.where(seen.until_P <= seen.left, 2e15 - idle_P * (layers + 1.0) - seen.until_P, passed_P)
