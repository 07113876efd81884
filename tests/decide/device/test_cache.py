"""Policies of a cache of experts: none moves less than Belady's, decisions are what they promise, twins agree."""

import dataclasses

import numpy as np
import pytest
from cache_traces import chance_trace, check, planted_trace, policies

from turnout.decide.device import cache
from turnout.errors import UsageError
from turnout.measure.cache import replay
from turnout.solve import belady
from turnout.types import CacheShape
from turnout.types.expert_cache import Access


def bound(told, sizes: CacheShape) -> int:
    """Belady's fetches: of all, or of each layer by itself."""
    pages = [told.page_R[told.start_J[at] : told.start_J[at + 1]].tolist() for at in range(len(told))]
    if sizes.shared:
        return belady(pages, capacity=sizes.slots).count
    layers = [[p for p, layer in zip(pages, told.layer_I, strict=True) if layer == each] for each in range(told.layers)]
    return sum(belady(one, capacity=sizes.slots).count for one in layers)


@pytest.mark.parametrize("block", range(20))
def test_none_moves_less_than_beladys_on_a_thousand_traces(block: int) -> None:
    """20 times 50; one in ten is replayed by the policy's own update too, which decides the same at every access."""
    for seed in range(50 * block, 50 * block + 50):
        told, sizes = chance_trace(seed)
        least = bound(told, sizes)
        for name, (policy, ahead) in policies(told).items():
            found = replay(told, policy, sizes, ahead=ahead)
            assert found.fetches >= least and found.hit_rate >= found.moved_rate, f"{name}, seed {seed}"
            slow = replay(told, policy, sizes, ahead=ahead, compiled=False) if seed % 10 == 0 else found
            for column in ("fetch_J", "fetch_R", "prefetch_J", "prefetch_R"):
                assert np.array_equal(getattr(slow, column), getattr(found, column)), f"{name}, seed {seed}, {column}"


@pytest.mark.parametrize("ahead", [0, 2])
def test_the_compiled_replay_is_told_what_update_is_told(ahead: int) -> None:
    """Whoever looks ahead without being told of anything goes by use; whoever does not, keeps to what it was told."""
    for seed in range(20):
        told, sizes = chance_trace(seed)
        for name, (policy, _) in policies(told).items():
            fast, slow = (replay(told, policy, sizes, ahead=ahead, compiled=each) for each in (True, False))
            assert np.array_equal(fast.fetch_R, slow.fetch_R), f"{name}, seed {seed}"


@pytest.mark.parametrize("seed", range(40))
def test_decisions_are_what_they_promise_and_states_stay_as_they_were(seed: int) -> None:
    told, sizes = chance_trace(seed)
    for name, (policy, ahead) in policies(told).items():
        state, held = policy.init(sizes), set()
        for at in range(len(told)):
            access, before = told.access(at, ahead), state
            kept = [each.copy() for each in (before.held_P, before.last_P, before.count_P)]
            state, decision = policy.update(before, access)
            again = policy.update(before, access)[1]
            assert decision == again, name
            assert all(map(np.array_equal, kept, (before.held_P, before.last_P, before.count_P))), name
            check(decision, held, access, sizes)
            assert {divmod(int(p), sizes.experts) for p in np.nonzero(state.held_P)[0]} == held, name


@pytest.mark.parametrize("seed", range(60))
def test_told_all_that_comes_look_ahead_is_beladys(seed: int) -> None:
    """One pass of many accesses: with and without fetching early, to the last fetch."""
    told, sizes = chance_trace(seed)
    told = dataclasses.replace(told, step_I=np.zeros_like(told.step_I))
    for prefetch in (False, True):
        found = replay(told, cache.PreGated(prefetch=prefetch), sizes, ahead=len(told))
        assert found.fetches == bound(told, sizes), f"seed {seed}"
        assert found.accuracy in (None, 1.0)


def test_where_there_is_locality_predictive_policies_beat_lru() -> None:
    """Held-out documents of planted topics, one pool and one for each layer."""
    learnt, told = planted_trace(0), planted_trace(1)
    for sizes in (CacheShape(4, 16, 5), CacheShape(4, 16, 20, shared=True)):
        misses = {
            name: replay(told, policy, sizes, ahead=ahead).misses for name, (policy, ahead) in policies(learnt).items()
        }
        assert misses["lfru"] < misses["lru"] and misses["pre-gated, a pass"] < misses["lru"] / 2


def test_what_one_pool_of_all_layers_is_too_small_for() -> None:
    """A pass that asks for more than the pool holds, over and over: LRU hits nothing, least-stale some."""
    told = planted_trace(2, documents=1, tokens=30, topics=1, k=2)
    told = dataclasses.replace(told, expert_R=np.tile(told.expert_R[:8], 30))  # every step like the first
    sizes = CacheShape(4, 16, 7, shared=True)
    lru, stale = (replay(told, policy, sizes) for policy in (cache.LRU(), cache.LeastStale()))
    assert lru.hit_rate < 0.5 and stale.hit_rate > 0.6
    assert stale.fetches == pytest.approx(bound(told, sizes), rel=0.35)


def test_lfru_lies_between_lru_and_lfu() -> None:
    told, sizes = planted_trace(3), CacheShape(4, 16, 5)
    short, long = cache.LFRU(half=0.2, layers=4), cache.LFRU(half=1e9, layers=4)
    assert replay(told, short, sizes).misses == pytest.approx(replay(told, cache.LRU(), sizes).misses, rel=0.02)
    assert replay(told, long, sizes).misses == pytest.approx(replay(told, cache.LFU(), sizes).misses, rel=0.02)


def test_what_does_not_fit_is_refused() -> None:
    policy = cache.LRU()
    state = policy.init(CacheShape(2, 4, 2))
    for layer, experts in ((0, (0, 1, 2)), (2, (0,)), (0, (4,)), (0, (1, 1))):
        with pytest.raises(UsageError, match="at most 2 different experts of 4"):
            policy.update(state, Access(layer, experts, 0))
    with pytest.raises(UsageError, match="half=16"):
        cache.LFRU(half=0, layers=1)
    told, _ = chance_trace(0)
    with pytest.raises(UsageError, match=f"slots={told.most}"):
        replay(told, policy, CacheShape(told.layers, told.experts, max(1, told.most - 1)))
    with pytest.raises(UsageError, match="take them from the trace"):
        replay(told, policy, CacheShape(told.layers + 1, told.experts, told.experts))
