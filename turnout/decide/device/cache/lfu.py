"""Least frequently used."""

import numpy as np

from turnout.decide.device.cache.history import History
from turnout.types.expert_cache import Access, CacheShape, Decision

__all__ = ["LFU"]


class LFU:
    """Gives up the expert that was used least often, the one used longest ago among equals.

    Uses are counted for as long as the state lives, also while an expert is not held.

    >>> policy = LFU()
    >>> state = policy.init(CacheShape(1, 4, 2))
    >>> for step, experts in enumerate([(0, 1), (0,), (1,), (0,)]):
    ...     state, _ = policy.update(state, Access(0, experts, step))
    >>> policy.update(state, Access(0, (3,), step=4))[1].evict
    ((0, 1),)

    Source: none; the textbook rule.
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
        """How often each was used; what was used later is worth a little more."""
        return count_P + last_P / (tick + 1.0)
