"""Least frequently used."""

import numpy as np

from turnout.decide.device.cache.history import History, by_worth
from turnout.types.expert_cache import Seen

__all__ = ["LFU"]


class LFU:
    """Gives up the expert that was used least often, the one used longest ago among equals.

    Uses are counted for as long as the state lives, also while an expert is not held.

    >>> from turnout.types import Access, CacheShape
    >>> policy = LFU()
    >>> state = policy.init(CacheShape(1, 4, 2))
    >>> for step, experts in enumerate([(0, 1), (0,), (1,), (0,)]):
    ...     state, _ = policy.update(state, Access(0, experts, step))
    >>> policy.update(state, Access(0, (3,), step=4))[1].evict
    ((0, 1),)

    Source: none; the textbook rule.
    """

    keep = 1.0

    init = staticmethod(History.empty)
    update = by_worth

    @staticmethod
    def worth(seen: Seen) -> np.ndarray:
        """How often each was used; what was used later is worth a little more."""
        return seen.count_P + seen.last_P / (seen.tick + 1.0)
