"""Policies by name, as commands are told them."""

from turnout.decide.device.cache.expert_flow import ExpertFlow
from turnout.decide.device.cache.learnt import Learnt
from turnout.decide.device.cache.least_stale import LeastStale
from turnout.decide.device.cache.lfru import LFRU
from turnout.decide.device.cache.lfu import LFU
from turnout.decide.device.cache.lru import LRU
from turnout.decide.device.cache.pre_gated import PreGated
from turnout.decide.device.cache.static import Static
from turnout.decide.device.cache.trace_matching import TraceMatching
from turnout.errors import UsageError, nearest, word
from turnout.types.expert_cache import CachePolicy, CacheShape

__all__ = ["LEARNING", "NAMES", "named_policy"]

# Simple ones first: at equal time ``turnout cache`` recommends the first.
NAMES = ("lru", "lfu", "lfru", "least_stale", "static", "trace_matching", "expert_flow", "pre_gated")
LEARNING = ("static", "trace_matching", "expert_flow")
_WHERE = "turnout.decide.device.cache.named_policy"


def named_policy(name: str, shape: CacheShape, learnt: Learnt | None = None) -> CachePolicy:
    """The policy of this name for a cache.

    Args:
        name: one of lru, lfu, lfru, least_stale, static, trace_matching, expert_flow, pre_gated.
        shape: of the cache.
        learnt: what the policy goes by, where it is static, trace_matching or expert_flow.

    Raises:
        UsageError: no such policy, one that was told nothing, or that learnt from a model of other sizes.

    >>> type(named_policy("lfru", CacheShape(2, 8, 4))).__name__
    'LFRU'

    Source: none; plain bookkeeping.
    """
    if name not in NAMES:
        raise nearest(name, list(NAMES), kind="policy", where=_WHERE)
    if name not in LEARNING:
        if name == "lfru":
            return LFRU(layers=shape.layers)
        return {"lru": LRU, "lfu": LFU, "least_stale": LeastStale, "pre_gated": PreGated}[name]()
    if learnt is None:
        fix = "pass learnt=Learnt.of(accesses, seed=0), or Learnt.open(file)"
        raise UsageError(word(name, got="nothing learnt", allowed="be told what to go by", where=_WHERE, fix=fix))
    learnt.check(shape)
    if name == "static":
        return Static(learnt.profile_LE)
    return TraceMatching(learnt.library_NLE) if name == "trace_matching" else ExpertFlow(learnt.predictor)
