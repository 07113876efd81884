"""Claim: experts merge with less loss when their neurons are matched first."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import EXPERTS, STEPS, TOP_K, sample, score, taught
from turnout.reshape.to_smaller.merge_experts import merge_experts as reshape

_KEEP = EXPERTS // 2


def merge_aligned() -> Claim:
    """Merged to half as many, experts whose neurons were aligned give fewer held-out bits per byte than as they lay.

    >>> merge_aligned().off
    'neurons as they lie'

    Source: Li et al., 2024, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", its
    ablation of permutation alignment.
    """
    return Claim(
        name="merge_aligned",
        statement="Experts merged to half as many lose less when their neurons are aligned by assignment first.",
        source="Li et al., 2024, Merge, Then Compress (M-SMoE)",
        off="neurons as they lie",
        switched={"aligned": "as they lie"},
        rows=(Row("held-out bits per byte", "below", "aligned", "as they lie", "merged without alignment"),),
        measure=_measure,
        seconds=8,
        note=f"2 layers, width 64, {EXPERTS} experts, top {TOP_K}, {STEPS} steps of 1,024 tokens; no training after",
    )


def _measure(seed: int) -> Values:
    lm, text = taught(seed, routed=True), sample(seed)
    arms = {"aligned": True, "as they lie": False}
    return {name: score(reshape(lm, keep=_KEEP, batches=text, align=align)[0]) for name, align in arms.items()}
