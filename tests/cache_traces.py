"""Traces and checks that tests of caches of experts share."""

import numpy as np

from turnout.decide.device import cache
from turnout.types import Accesses, CacheShape
from turnout.types.expert_cache import Decision


def chance_trace(seed: int) -> tuple[Accesses, CacheShape]:
    """A few steps of a small model at random, and a cache that holds the largest access."""
    rng = np.random.default_rng(seed)
    layers, experts = int(rng.integers(1, 4)), int(rng.integers(2, 7))
    used_SLE = rng.random((int(rng.integers(1, 13)), layers, experts)) < rng.uniform(0.1, 0.6)
    used_SLE[0, 0, 0] = True
    sequence_S = np.sort(rng.integers(0, 3, len(used_SLE)))
    told = Accesses.of_used(used_SLE, sequence_S)
    slots, shared = int(rng.integers(told.most, experts + 1)), bool(rng.integers(2))
    return told, CacheShape(layers, experts, slots + int(rng.integers(0, 4)) * shared, shared)


def planted_trace(seed: int, *, documents: int = 12, tokens: int = 40, layers: int = 4, experts: int = 16, k: int = 2,
                  topics: int = 4) -> Accesses:  # fmt: skip
    """Documents of a few topics; each topic has favourites in every layer, and tokens keep to them for a while."""
    rng = np.random.default_rng(seed)
    topic_ZLE = np.random.default_rng(99).standard_normal((topics, layers, experts)) * 2.5
    rows, texts = [], []
    for document in range(documents):
        liking_LE = topic_ZLE[rng.integers(topics)] + rng.standard_normal((layers, experts))
        for _ in range(tokens):
            noisy_LE = liking_LE + rng.gumbel(size=(layers, experts))
            rows.append(np.argpartition(-noisy_LE, k, axis=1)[:, :k])
            texts.append(document)
    return Accesses.of_paths(np.stack(rows), experts=experts, document_T=np.array(texts))


def check(decision: Decision, held: set[tuple[int, int]], access, sizes: CacheShape) -> None:
    """What the noun promises of a decision; ``held`` is brought up to date."""
    asked = [(access.layer, expert) for expert in access.experts]
    assert len(set(decision.evict)) == len(decision.evict) and set(decision.evict) <= held | set(decision.prefetch)
    assert not set(decision.evict) & set(asked)
    assert decision.fetch == tuple(one for one in asked if one not in held)
    assert len(set(decision.prefetch)) == len(decision.prefetch) and not set(decision.prefetch) & (held | set(asked))
    held.difference_update(decision.evict)
    held.update(decision.fetch, decision.prefetch)
    assert held.issuperset(asked)
    for layer in [None] if sizes.shared else range(sizes.layers):
        assert sum(layer in (None, one[0]) for one in held) <= sizes.slots


def policies(told: Accesses) -> dict[str, tuple[object, int]]:
    """Every policy with how far ahead it is told."""
    profile_LE = told.used().sum(0)
    return {
        "lru": (cache.LRU(), 0),
        "lfu": (cache.LFU(), 0),
        "lfru": (cache.LFRU(half=2.0, layers=told.layers), 0),
        "static": (cache.Static(profile_LE), 0),
        "least stale": (cache.LeastStale(), 0),
        "pre-gated, one layer": (cache.PreGated(), 1),
        "pre-gated, a pass": (cache.PreGated(), told.layers),
        "told alone": (cache.PreGated(prefetch=False), told.layers),
    }
