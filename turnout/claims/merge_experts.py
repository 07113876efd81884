"""Claim: experts merge with less loss when their neurons are matched first."""

import time

from turnout.claims.claim import Claim, Evidence
from turnout.claims.taught import EXPERTS, STEPS, TOP_K, sample, score, taught
from turnout.claims.trial import SEEDS, Note
from turnout.reshape.merge_experts import merge_experts as reshape

_KEEP = EXPERTS // 2


def merge_experts(*, note: Note = None) -> Claim:
    """Merged to half as many, experts whose neurons were aligned give fewer held-out bits per byte than as they lay.

    >>> merge_experts.__name__  # the run itself takes half a minute: turnout verify merge_experts
    'merge_experts'

    Source: Li et al., 2024, "Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy", its
    ablation of permutation alignment.
    """
    began = time.perf_counter()
    aligned, plain = [], []
    for seed in SEEDS:
        lm, text = taught(seed, routed=True), sample(seed)
        aligned.append(score(reshape(lm, keep=_KEEP, batches=text)[0]))
        plain.append(score(reshape(lm, keep=_KEEP, batches=text, align=False)[0]))
        if note:
            found = f"{aligned[-1]:.4f} merged with alignment, {plain[-1]:.4f} without"
            note(f"seed {seed}: {score(lm):.4f} bits per byte whole; {found}")
    return Claim(
        name="merge_experts",
        statement="Experts merged to half as many lose less when their neurons are aligned by assignment first.",
        source="Li et al., 2024, Merge, Then Compress (M-SMoE)",
        evidence=(
            Evidence("held-out bits per byte", "below", tuple(aligned), tuple(plain), "merged without alignment"),
        ),
        seconds=time.perf_counter() - began,
        note=f"2 layers, width 64, {EXPERTS} experts, top {TOP_K}, {STEPS} steps of 1,024 tokens; no training after",
    )
