"""Claim: experts that the router treats alike, weighted by how often they are used, merge with less loss."""

import statistics

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import EXPERTS, STEPS, TOP_K, sample, score, taught
from turnout.reshape.to_smaller.compress_experts import compress_experts
from turnout.reshape.to_smaller.merge_experts import merge_experts as reshape
from turnout.types import Report

_KEEP, _DRAWS = EXPERTS // 2, 3  # draws of random groups: the mean, so that the luck of one is not the control


def merge_experts() -> Claim:
    """Merged to half as many, groups and weights from the routing against random groups with equal weights.

    Neurons are aligned in both; what alignment does is the claim merge_aligned.

    >>> merge_experts().off
    'random groups, equal weights'

    Source: Li et al., 2024, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", its
    ablations of grouping and merging, and its finding that merging lowers the rank.
    """
    rank = "mean stable rank of the experts' matrices"
    return Claim(
        name="merge_experts",
        statement="Experts merged to half as many in groups and with weights from the routing lose less than in random "
        "groups with equal weights, and have a lower stable rank than before.",
        source="Li et al., 2024, Merge, Then Compress (M-SMoE)",
        off="random groups, equal weights",
        switched={"routing": "random"},
        rows=(
            Row("held-out bits per byte", "below", "routing", "random", f"random groups, mean of {_DRAWS} draws"),
            Row(rank, "below", "rank", "rank before", "the experts before", headline=True),
        ),
        measure=_measure,
        seconds=12,
        note=f"2 layers, width 64, {EXPERTS} experts, top {TOP_K}, {STEPS} steps of 1,024 tokens; no training after. "
        "Before: {before:.3f}",
        limits=(0.0, 40.0),
    )


def _measure(seed: int) -> Values:
    lm, text = taught(seed, routed=True), sample(seed)
    merged = reshape(lm, keep=_KEEP, batches=text)[0]
    drawn = [reshape(lm, keep=_KEEP, batches=text, by="random", seed=draw)[0] for draw in range(_DRAWS)]
    return {
        "routing": score(merged),
        "random": statistics.fmean(map(score, drawn)),
        "before": score(lm),
        "rank": _rank(compress_experts(merged, rank=0, rows=1.0)[1]),
        "rank before": _rank(compress_experts(lm, rank=0, rows=1.0)[1]),
    }


def _rank(report: Report) -> float:
    by_layer = report["stable_rank_before"]
    assert isinstance(by_layer, dict)
    return statistics.fmean(by_layer.values())
