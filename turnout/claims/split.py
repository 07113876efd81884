"""Claim: a dense layer splits into experts with less loss along clusters of its neurons than at random."""

import time

from turnout.claims.claim import Claim, Evidence
from turnout.claims.taught import HIDDEN, STEPS, sample, score, taught
from turnout.claims.trial import SEEDS, Note
from turnout.reshape.split import split as reshape

_EXPERTS, _TOP_K = 8, 4


def split(*, note: Note = None) -> Claim:
    """With half of the experts on, clustered neurons give fewer held-out bits per byte than neurons dealt at random.

    >>> split.__name__  # the run itself takes half a minute: turnout verify split
    'split'

    Source: Zhang et al., 2022, "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts"; Zhu et al.,
    2024, "LLaMA-MoE: Building Mixture-of-Experts from LLaMA with Continual Pre-training", which then trains on.
    """
    began = time.perf_counter()
    found: dict[str, list[float]] = {"cluster": [], "coactivation": [], "gradient": [], "random": []}
    for seed in SEEDS:
        lm, text = taught(seed, routed=False), sample(seed)
        for by, values in found.items():
            new, _ = reshape(lm, num_experts=_EXPERTS, top_k=_TOP_K, by=by, batches=text, seed=seed)  # type: ignore[arg-type]
            values.append(score(new))
        if note:
            each = ", ".join(f"{values[-1]:.4f} by {by}" for by, values in found.items())
            note(f"seed {seed}: {score(lm):.4f} bits per byte dense; {each}")
    control = tuple(found["random"]), "neurons at random"
    return Claim(
        name="split",
        statement="Experts made of clustered neurons lose less than experts of random ones when half of them are on.",
        source="Zhang et al., 2022, MoEfication; Zhu et al., 2024, LLaMA-MoE",
        evidence=(
            Evidence("held-out bits per byte, by weights", "below", tuple(found["cluster"]), *control),
            Evidence("held-out bits per byte, by co-activation", "below", tuple(found["coactivation"]), *control),
            Evidence("held-out bits per byte, by gradient", "below", tuple(found["gradient"]), *control),
        ),
        seconds=time.perf_counter() - began,
        note=f"2 layers, width 64, hidden {HIDDEN}, {_EXPERTS} experts, {_TOP_K} on, {STEPS} steps of 1,024 tokens; no "
        "training after",
    )
