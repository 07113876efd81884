"""Claim: REAP's score says which experts to drop, better than how often they are used."""

import statistics
import time

from turnout.claims.claim import Claim, Evidence
from turnout.claims.taught import EXPERTS, STEPS, TOP_K, sample, score, taught
from turnout.claims.trial import SEEDS, Note
from turnout.reshape.drop_experts import drop_experts as reshape

_KEEP = EXPERTS // 2
_DRAWS = 5  # of random experts: the mean, so that the luck of one draw is not the control


def drop_experts(*, note: Note = None) -> Claim:
    """With half of the experts dropped, REAP leaves fewer held-out bits per byte than frequency and than chance.

    >>> drop_experts.__name__  # the run itself takes half a minute: turnout verify drop_experts
    'drop_experts'

    Source: Lasby et al., 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression".
    """
    began = time.perf_counter()
    found: dict[str, list[float]] = {"reap": [], "frequency": [], "random": []}
    for seed in SEEDS:
        lm, text = taught(seed, routed=True), sample(seed)
        for by, values in found.items():
            draws = range(_DRAWS) if by == "random" else (seed,)
            smaller = [reshape(lm, keep=_KEEP, by=by, batches=text, seed=draw)[0] for draw in draws]  # type: ignore[arg-type]
            values.append(statistics.fmean(map(score, smaller)))
        if note:
            each = ", ".join(f"{values[-1]:.4f} by {by}" for by, values in found.items())
            note(f"seed {seed}: {score(lm):.4f} bits per byte whole; {each}")
    reap = tuple(found["reap"])
    return Claim(
        name="drop_experts",
        statement="Dropping half of the experts by REAP's score costs less than by frequency or by chance.",
        source="Lasby et al., 2025, REAP the Experts",
        evidence=(
            Evidence(
                "held-out bits per byte",
                "below",
                reap,
                tuple(found["random"]),
                f"random experts, mean of {_DRAWS} draws",
            ),
            Evidence("held-out bits per byte", "below", reap, tuple(found["frequency"]), "the least used experts"),
        ),
        seconds=time.perf_counter() - began,
        note=f"2 layers, width 64, {EXPERTS} experts, top {TOP_K}, {STEPS} steps of 1,024 tokens; "
        f"{_KEEP} experts left, no training after. The load is balanced (loss-free); where an auxiliary loss of 0.01 "
        "had left it uneven, the least used experts were the better ones to drop, 2.86 against 3.04",
    )
