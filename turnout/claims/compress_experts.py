"""Claim: of merged experts, low rank plus the rows that the loss feels keeps more than other rows, or rows alone."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import EXPERTS, STEPS, TOP_K, sample, score, taught
from turnout.reshape.to_smaller.compress_experts import compress_experts as reshape
from turnout.reshape.to_smaller.merge_experts import merge_experts

# Rank 10 and a tenth of the rows: as many parameters as rank 14 alone, or 36 % of the rows alone.
_KEEP, _RANK, _ROWS, _RANK_ALONE, _ROWS_ALONE = EXPERTS // 2, 10, 0.1, 14, 0.36


def compress_experts() -> Claim:
    """Merged experts, compressed, lose less with rows of high sensitivity than with random rows, or with one of both.

    >>> compress_experts().off
    'rows at random'

    Source: Li et al., 2024, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", the
    parts of its compression.
    """
    bits = "held-out bits per byte"
    low = "low rank alone, equal parameters"
    return Claim(
        name="compress_experts",
        statement="Of merged experts, low rank plus the rows that the loss is most sensitive to loses less than low "
        "rank plus random rows, rows alone, or low rank alone.",
        source="Li et al., 2024, Merge, Then Compress (MC-SMoE)",
        off="rows at random",
        switched={"both": "random rows"},
        rows=(
            Row(bits, "below", "both", "random rows", "rows at random"),
            Row(bits, "below", "both", "rows alone", "rows alone, equal parameters", headline=True),
            Row(bits, "below", "both", "rank alone", low, headline=True),
        ),
        measure=_measure,
        seconds=16,
        note=f"2 layers, width 64, {EXPERTS} experts, top {TOP_K}, {STEPS} steps of 1,024 tokens, merged to {_KEEP}; "
        f"rank {_RANK} and {_ROWS:.0%} of the rows; merged alone has {{before:.3f}}. No training after, which the "
        "paper has",
    )


def _measure(seed: int) -> Values:
    lm, text = taught(seed, routed=True), sample(seed)
    merged = merge_experts(lm, keep=_KEEP, batches=text)[0]
    return {
        "both": score(reshape(merged, rank=_RANK, rows=_ROWS, batches=text)[0]),
        "random rows": score(reshape(merged, rank=_RANK, rows=_ROWS, by="random", seed=seed)[0]),
        "rank alone": score(reshape(merged, rank=_RANK_ALONE, rows=0.0)[0]),
        "rows alone": score(reshape(merged, rank=0, rows=_ROWS_ALONE, batches=text)[0]),
        "before": score(merged),
    }
