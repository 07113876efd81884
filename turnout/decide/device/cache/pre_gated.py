"""Pre-gated look-ahead: a router that runs ahead says what comes, and within that Belady's rule is exact."""

import functools

import numpy as np

from turnout.decide.device.cache.history import History
from turnout.types.expert_cache import Access, Decision, Seen

__all__ = ["PreGated"]


class PreGated:
    """Fetches what is known to come, and gives up what is needed last or is not known to come.

    Each access says which requests follow (``Access.coming``): a layer's gate that runs one layer early tells of one, a
    router of all layers before the pass of all that are left in it, one over a queue of tokens of several passes. What
    is needed within them is worth more the sooner; the rest is worth less than all of that, the longest unused least.
    An early fetch takes the slot only of what is not known to come, so it moves no more than waiting would: with all
    that comes told, the fetches are Belady's optimum.

    Args:
        prefetch: whether it also fetches before the time.

    >>> from turnout.types import CacheShape
    >>> policy = PreGated()
    >>> state = policy.init(CacheShape(1, 4, 2))
    >>> state, _ = policy.update(state, Access(0, (0, 1), step=0, coming=((0, (1,)),)))
    >>> policy.update(state, Access(0, (1,), step=1, coming=((0, (2,)), (0, (1,)))))[1]
    Decision(evict=((0, 0),), fetch=(), prefetch=((0, 2),))

    Source: Cai et al., 2024, "Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System
    Co-Design"; Hwang et al., 2024, "Pre-gated MoE", whose gates run one layer ahead.
    """

    keep = 1.0
    init = staticmethod(History.empty)

    def __init__(self, *, prefetch: bool = True) -> None:
        self.prefetch = prefetch

    def update(self, state: History, access: Access) -> tuple[History, Decision]:
        """Fetches what is missing, then what comes, in its order."""
        now = state.touched(access)
        told_P = np.full(len(now.held_P), -np.inf)
        for far, (layer, experts) in reversed(list(enumerate(access.coming, 1))):
            told_P[layer * now.sizes.experts + np.array(experts, np.int64)] = -float(now.tick + far)
        worth = functools.partial(now.worths, self.worth, access.layer, told_P)
        if not self.prefetch:
            return now.served(access, worth)
        wish_P = np.nonzero(np.isfinite(told_P))[0]
        return now.served(access, worth, wish_P[np.argsort(-told_P[wish_P], kind="stable")].tolist(), below=-1e14)

    @staticmethod
    def worth(seen: Seen) -> np.ndarray:
        """Minus the time of the next use that is known; below that, when each was used last."""
        return np.where(np.isfinite(seen.told_P), seen.told_P, seen.last_P - 1e15)
