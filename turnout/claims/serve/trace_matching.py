"""Trace matching: which recorded text is this one, after some layers of its first pass."""

from typing import cast

import numpy as np

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.serve.planted_paths import planted_paths
from turnout.decide.device.cache import LRU, TraceMatching
from turnout.decide.device.cache.trace_matching import Matched
from turnout.measure.cache import replay
from turnout.types import Accesses, CacheShape

__all__ = ["trace_matching"]

_TEXTS, _LAYERS, _EXPERTS, _USES = 20, 12, 32, 4
_SLOTS = 10


class _Unseen(TraceMatching):
    """Compares the layers that have not run yet, as the published code does."""

    def match(self, state: Matched) -> int:
        unseen_L = ~state.count_LE.any(1)
        return int(state.like_NL[:, unseen_L].sum(1).argmax()) if unseen_L.any() else super().match(state)


def _measure(seed: int) -> Values:
    rng = np.random.default_rng(seed)
    path_TLK = np.argsort(rng.random((_TEXTS, _LAYERS, _EXPERTS)), axis=2)[:, :, :_USES]
    told = Accesses.of_paths(path_TLK, experts=_EXPERTS, document_T=np.arange(_TEXTS))
    values = {"chance": 1 - 1 / _TEXTS}
    for name, kind in (("seen", TraceMatching), ("unseen", _Unseen)):
        policy, right, asked = kind.learn(told), 0, 0
        state = policy.init(CacheShape(_LAYERS, _EXPERTS, _USES))
        for access in told:
            state = cast(Matched, policy.update(state, access)[0])
            if access.layer + 1 < _LAYERS:
                right, asked = right + (policy.match(state) == access.sequence), asked + 1
        values[name] = 1 - right / asked
    return {**values, **_on_others(seed)}


def _on_others(seed: int) -> Values:
    """What matching is worth to texts that are like those recorded, and none of them."""
    known, told = planted_paths(seed, 2 * seed), planted_paths(seed, 2 * seed + 1, texts=12)
    sizes, values = CacheShape(told.layers, told.experts, _SLOTS), {}
    for name, policy in (("matched", TraceMatching.learn(known)), ("lru", LRU())):
        found = replay(told, policy, sizes)
        values[f"{name} waits"] = 1 - found.hit_rate
        values[f"{name} time"] = found.timing(fetch_s=1.0, compute_s=1.0).seconds
    return values | {f"{name} time": values[f"{name} time"] / values["lru time"] for name in ("matched", "lru")}


def trace_matching() -> Claim:
    """Matching on the layers that have run, against matching on those that have not.

    >>> trace_matching().off
    'layers that have not run yet are compared, as the published code does'

    Source: Xue et al., 2024, "MoE-Infinity: Efficient MoE Inference on Personal Machines with Sparsity-Aware Expert
    Cache".
    """
    metric = "texts not recognised in their first pass, of those recorded before"
    return Claim(
        name="trace_matching",
        statement="A text that was recorded is recognised by the experts of its first layers.",
        source='Xue et al., 2024, "MoE-Infinity: Efficient MoE Inference on Personal Machines"',
        off="layers that have not run yet are compared, as the published code does",
        switched={"seen": "unseen"},
        rows=(
            Row(metric, "within", "seen", "unseen", "layers that have not run", bound=0.05),
            Row(metric, "below", "seen", "chance", "a guess"),
            Row("experts waited for, of those asked for, new texts", "below", "matched waits", "lru waits", "LRU",
                headline=True),
            Row("time of decoding over LRU's, new texts", "within", "matched time", "lru time",
                "LRU; the paper has 1/3.1 to 1/16.7 of its baselines'", bound=0.323, headline=True),
        ),
        measure=_measure,
        seconds=5,
        note="20 texts, 12 layers of 32 experts, 4 taken; {seen:.3f} are missed by layers that have run, {unseen:.3f} "
        "by those that have not, {chance:.2f} by chance. Of new texts, 6 layers of 32, 3 taken, 10 slots a layer, "
        "an expert comes in the time of a layer's pass; {matched waits:.3f} waited for, with LRU {lru waits:.3f}; time "
        "{matched time:.2f} of LRU's",
        simulated=True,
    )  # fmt: skip
