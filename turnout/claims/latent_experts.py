"""Claim: experts go into a shared latent space with the error foretold; and share enough for it to be worth it."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import EXPERTS, STEPS, TOP_K, sample, score, taught
from turnout.reshape.to_smaller.compress_experts import compress_experts
from turnout.reshape.to_smaller.latent_experts import latent_experts as reshape
from turnout.types import Report

# A space of 32 for all 16 experts takes as many parameters as a rank of 20 for each alone.
_RANK, _RANK_ALONE, _EXACT = 32, 20, 1e-4


def latent_experts() -> Claim:
    """One space for all experts against factors for each of as many parameters; its error is the one foretold.

    >>> latent_experts().off
    'nothing shared: factors for each expert'

    Source: Liu et al., 2025, "Beyond Standard MoE: Mixture of Latent Experts for Resource-Efficient Language Models",
    its optimal factorization. The paper does not compare with factors for each expert.
    """
    return Claim(
        name="latent_experts",
        statement="Experts in a shared latent space need fewer bits than in factors of their own with as many "
        "parameters; their error is what the singular values of the stacked matrices foretell.",
        source="Liu et al., 2025, Beyond Standard MoE: Mixture of Latent Experts",
        off="nothing shared: factors for each expert",
        switched={"shared": "alone", "gap": "gap random"},
        rows=(
            Row("held-out bits per byte", "below", "shared", "alone", "factors for each expert, equal parameters"),
            Row("gap of error and formula, relative", "within", "gap", "gap random", "a random basis", bound=_EXACT),
        ),
        measure=_measure,
        seconds=8,
        note=f"2 layers, width 64, {EXPERTS} experts of 96, top {TOP_K}, {STEPS} steps of 1,024 tokens; a space of "
        f"{_RANK} against ranks of {_RANK_ALONE}, no training after. {{before:.3f}} bits before, {{random:.3f}} in a "
        "random space",
    )


def _measure(seed: int) -> Values:
    lm, text = taught(seed, routed=True), sample(seed, rows=8)
    new, report = reshape(lm, rank=_RANK, batches=text)
    drawn, other = reshape(lm, rank=_RANK, basis="random", batches=text, seed=seed)
    alone = compress_experts(lm, rank=_RANK_ALONE, rows=0.0, batches=text)[0]
    bits = {"shared": score(new), "alone": score(alone), "random": score(drawn), "before": score(lm)}
    return bits | {"gap": _gap(report, report), "gap random": _gap(other, report)}


def _gap(report: Report, foretold: Report) -> float:
    """The largest over layers of |measured - foretold| / foretold."""
    measured, bound = report["relative_error"], foretold["bound"]
    assert isinstance(measured, dict) and isinstance(bound, dict)
    return max(abs(measured[layer]["both"] / bound[layer]["both"] - 1) for layer in bound)
