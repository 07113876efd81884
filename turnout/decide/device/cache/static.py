"""A static profile: the experts that a recorded workload used most stay."""

import numpy as np

from turnout.decide.device.cache.history import History, by_worth
from turnout.types.expert_cache import Seen

__all__ = ["Static"]


class Static:
    """Gives up the expert that the profile has seen used least.

    All slots but as many as one access needs come to hold the profile's favourites and keep them.

    Args:
        profile_LE: (L, E) how often each expert was used in what was recorded.

    >>> from turnout.types import Access, CacheShape
    >>> policy = Static(np.array([[5, 1, 4, 2]]))
    >>> state, _ = policy.update(policy.init(CacheShape(1, 4, 2)), Access(0, (0, 1), step=0))
    >>> policy.update(state, Access(0, (3,), step=1))[1].evict
    ((0, 1),)

    Source: none; the pinning of hot experts that servers offer.
    """

    keep = 1.0

    def __init__(self, profile_LE: np.ndarray) -> None:
        self.profile_P = np.asarray(profile_LE, np.float64).reshape(-1)

    init = staticmethod(History.empty)
    update = by_worth

    @staticmethod
    def worth(seen: Seen) -> np.ndarray:
        """What the profile says; among equals, what was used later."""
        return seen.told_P + seen.last_P / (seen.tick + 1.0)
