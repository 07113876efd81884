"""What a survey says of caching experts: a cache, then prediction, then knowledge, each faster than the one before."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.serve.own_rate import own_rate
from turnout.claims.serve.planted_paths import planted_paths
from turnout.decide.device.cache import LRU, ExpertFlow, PreGated
from turnout.measure.cache import Replay, replay
from turnout.types import CacheShape

__all__ = ["expert_caching"]

_SLOTS = 10


def _measure(seed: int) -> Values:
    known, told = planted_paths(seed, 2 * seed), planted_paths(seed, 2 * seed + 1, texts=12)
    sizes, tight = (CacheShape(told.layers, told.experts, slots) for slots in (_SLOTS, told.most))
    flow = ExpertFlow.learn(known, seed=seed)
    arms: dict[str, Replay] = {
        "none": replay(told, LRU(), tight),
        "cache": replay(told, LRU(), sizes),
        "predicted": replay(told, flow, sizes),
        "own rate": replay(told, own_rate(flow.predictor), sizes),
        "known": replay(told, PreGated(), sizes, ahead=told.layers),
    }
    seconds = {name: each.timing(fetch_s=1.0, compute_s=1.0).seconds for name, each in arms.items()}
    return {name: each / seconds["none"] for name, each in seconds.items()}


def expert_caching() -> Claim:
    """The order of system-level techniques: fetched on demand, cached, prefetched by prediction, known beforehand.

    >>> expert_caching().off
    'the technique before it in the order; of prediction, the same cache without'

    Source: Liu et al., 2024, "A Survey on Inference Optimization Techniques for Mixture of Experts Models".
    """
    metric = "time of decoding, over fetching on demand"
    return Claim(
        name="expert_caching",
        statement="Experts in little memory: a cache is faster than fetching on demand, prefetching by prediction "
        "faster than a cache alone, and a router that runs ahead faster than prediction.",
        source='Liu et al., 2024, "A Survey on Inference Optimization Techniques for Mixture of Experts Models"',
        off="the technique before it in the order; of prediction, the same cache without",
        switched={"cache": "none", "predicted": "own rate", "known": "predicted"},
        rows=(
            Row(metric, "below", "cache", "none", "no more slots than one pass of a layer needs"),
            Row(metric, "below", "predicted", "own rate", "the same cache by a text's own rates, nothing predicted"),
            Row(metric, "below", "predicted", "cache", "LRU", headline=True),
            Row(metric, "below", "known", "predicted", "ExpertFlow"),
        ),
        measure=_measure,
        seconds=15,
        note="planted texts, 6 layers of 32 experts, 3 taken, 10 slots a layer; an expert comes in the time of a "
        "layer's pass; {cache:.3f} with a cache, {own rate:.3f} with "
        "one by a text's own rates, {predicted:.3f} with prediction, {known:.3f} with a router ahead",
        simulated=True,
    )
