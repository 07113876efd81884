"""Policies that learn: twins agree, none is below the bound, the same seed gives the same, and they beat LRU."""

import dataclasses

import numpy as np
import pytest
from cache_traces import chance_trace, check, planted_trace

from turnout.decide.device import cache, regroup
from turnout.errors import ShapeError, UsageError
from turnout.measure.cache import replay, replays
from turnout.types import Accesses, CacheShape
from turnout.types.expert_cache import Access


def learnt(told) -> dict[str, object]:
    predictor = cache.learn_routes(told, seed=0, steps=3, hidden=4)
    return {
        "trace matching": cache.TraceMatching.learn(told),
        "flow": cache.ExpertFlow(predictor, likely=0.2),
        "uncorrected": cache.ExpertFlow(predictor, correct=False),
    }


@pytest.mark.parametrize("seed", range(30))
def test_twins_agree_and_none_moves_less_than_beladys(seed: int) -> None:
    told, sizes = chance_trace(seed)
    every = dataclasses.replace(told, step_I=told.step_I * 0)
    least = replay(every, cache.PreGated(prefetch=False), sizes, ahead=len(told)).fetches
    wide = dataclasses.replace(sizes, slots=sizes.slots + 1)
    for name, policy in learnt(told).items():
        state, held, fetches, early = policy.init(sizes), set(), [], []
        for access in told:
            after, decision = policy.update(state, access)
            assert policy.update(state, access)[1] == decision, "the given state stays as it was"
            check(decision, held, access, sizes)
            fetches += [layer * told.experts + expert for layer, expert in decision.fetch]
            early += [layer * told.experts + expert for layer, expert in decision.prefetch]
            state = after
        found, wider = replays(told, policy, [sizes, wide])
        assert found.fetch_R.tolist() == fetches and found.prefetch_R.tolist() == early, f"{name}, seed {seed}"
        assert found.fetches >= least, f"{name}, seed {seed}"
        assert np.array_equal(wider.fetch_R, replay(told, policy, wide).fetch_R), f"{name}, seed {seed}"


def test_what_learnt_from_other_texts_beats_lru_on_these() -> None:
    known, told = planted_trace(0, documents=24), planted_trace(1, documents=8)
    for sizes in (CacheShape(4, 16, 4), CacheShape(4, 16, 16, shared=True)):
        lru = replay(told, cache.LRU(), sizes)
        for policy in (cache.TraceMatching.learn(known), cache.ExpertFlow.learn(known)):
            found = replay(told, policy, sizes)
            assert found.misses < lru.misses, policy
            times = [each.timing(fetch_s=1.0, compute_s=1.0).seconds for each in (found, lru)]
            assert times[0] < times[1], policy


def test_the_same_seed_learns_the_same_to_the_bit() -> None:
    told = planted_trace(0, documents=4)
    first, again = (cache.learn_routes(told, seed=3, steps=20).weights for _ in range(2))
    other = cache.learn_routes(told, seed=4, steps=20).weights
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["W"], other["W"])


def test_tokens_that_decide_are_learnt_from() -> None:
    """Experts of layer 0 hang on the token alone, and those of layer 1 on those of layer 0."""
    rng = np.random.default_rng(0)
    token_S = rng.integers(0, 8, 1500)
    used_SLE = np.zeros((1500, 2, 8), bool)
    used_SLE[np.arange(1500), 0, token_S] = used_SLE[np.arange(1500), 1, (token_S * 3) % 8] = True
    predictor = cache.learn_routes(Accesses.of_used(used_SLE, np.zeros(1500, int), token_S), seed=0, steps=200)
    nothing = np.zeros(16)
    for token in range(8):
        path_LE = predictor.paths(nothing, nothing, token)
        assert path_LE.argmax(1).tolist() == [token, token * 3 % 8] and path_LE.max() > 0.8
        blind_E = predictor.paths(nothing, nothing)[1]
        assert predictor.corrected(blind_E, 0, (token,)).argmax() == token * 3 % 8
    assert predictor.paths(nothing, nothing).max() < 0.5


def test_a_text_that_was_recorded_is_recognised_after_one_layer() -> None:
    rng = np.random.default_rng(0)
    library = (rng.random((20, 4, 16)) < 0.2).astype(float)
    policy = cache.TraceMatching(library)
    for text in range(20):
        state = policy.init(CacheShape(4, 16, 16))
        for layer in range(4):
            experts = tuple(np.nonzero(library[text, layer])[0].tolist())
            if experts:
                state, decision = policy.update(state, Access(layer, experts, 0, sequence=text))
                assert policy.match(state) == text
                assert all(library[text, there, expert] for there, expert in decision.prefetch)


def test_regrouping_wakes_fewer_experts_and_loses_nobody() -> None:
    rng = np.random.default_rng(0)
    topic_N = rng.integers(0, 4, 30)
    path_NLE = rng.random((30, 3, 16)) < np.where(np.arange(16) // 4 == topic_N[:, None], 0.6, 0.05)[:, None]
    batches = regroup(path_NLE, size=4)
    assert sorted(n for batch in batches for n in batch) == list(range(30)) and max(map(len, batches)) == 4
    arrival = [range(n, min(30, n + 4)) for n in range(0, 30, 4)]
    awake = [sum(path_NLE[list(batch)].any(0).sum() for batch in each) for each in (batches, arrival)]
    assert awake[0] < 0.8 * awake[1] and regroup(path_NLE, size=4) == batches
    assert regroup(np.zeros((0, 1, 1)), size=3) == ()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ShapeError, match="TraceMatching.learn"):
        cache.TraceMatching(np.zeros((2, 2)))
    with pytest.raises(ShapeError, match="record this model"):
        cache.TraceMatching(np.ones((1, 2, 2))).init(CacheShape(3, 2, 1))
    with pytest.raises(ShapeError, match="0 and 1"):
        regroup(np.full((1, 1, 1), 2.0), size=1)
    with pytest.raises(UsageError, match="size=1"):
        regroup(np.zeros((1, 1, 1)), size=0)
