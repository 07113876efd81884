"""Claim: a dense layer splits into experts with less loss along clusters of its neurons than at random."""

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import HIDDEN, STEPS, sample, score, taught
from turnout.claims.trial import trial
from turnout.models import LM
from turnout.reshape.to_sparse.split import split as reshape

_EXPERTS, _TOP_K, _AFTER = 8, 4, 60
_LR = {"lr": 1e-3, "min_lr": 1e-4}
_BY = ("cluster", "coactivation", "gradient", "random")


def split() -> Claim:
    """With half of the experts on, clustered neurons give fewer held-out bits per byte than neurons dealt at random.

    Random neurons are scaled by N / K, as LLaMA-MoE does; without that they lose more. The clustered ones are better
    unscaled, and are measured so.

    >>> split().off
    'neurons dealt at random, scaled by N / K'

    Source: Zhang et al., 2022, "MoEfication: Transformer Feed-forward Layers are Mixtures of Experts"; Zhu et al.,
    2024, "LLaMA-MoE: Building Mixture-of-Experts from LLaMA with Continual Pre-training", which then trains on and
    finds random neurons best then. Its clusters are of the rows of the up projection, ours of the gate's.
    """
    bits, off, best = "held-out bits per byte", "random, scaled", "neurons by weights, trained as long"
    against = "neurons at random, scaled by N / K"
    by = {"cluster": "by weights", "coactivation": "by co-activation", "gradient": "by gradient"}
    after = f"{bits}, at random, {_AFTER} steps after"
    return Claim(
        name="split",
        statement="Experts made of clustered neurons lose less than experts of random ones when half of them are on; "
        "after more training random ones are best.",
        source="Zhang et al., 2022, MoEfication; Zhu et al., 2024, LLaMA-MoE",
        off="neurons dealt at random, scaled by N / K",
        switched=dict.fromkeys(by, off),
        rows=(
            *(Row(f"{bits}, {words}", "below", name, off, against) for name, words in by.items()),
            Row(after, "below", "random, after", "cluster, after", best, headline=True),
        ),
        measure=_measure,
        seconds=38,
        note=f"2 layers, width 64, hidden {HIDDEN}, {_EXPERTS} experts, {_TOP_K} on, {STEPS} steps of 1,024 tokens. "
        "Random neurons without the scale: {random:.3f}; clustered by weights with it: {cluster, scaled:.3f}; dense: "
        "{dense:.3f}",
    )


def _measure(seed: int) -> Values:
    lm, text = taught(seed, routed=False), sample(seed)
    made = {
        by: reshape(lm, num_experts=_EXPERTS, top_k=_TOP_K, by=by, batches=text, seed=seed)[0]  # type: ignore[arg-type]
        for by in _BY
    }
    found = {"dense": score(lm)} | {by: score(model) for by, model in made.items()}
    for by in ("random", "cluster"):
        found[f"{by}, scaled"] = score(_scaled(made[by]))
    for by in ("random", "cluster"):
        done = trial(made[by], seed=seed + 1000, steps=_AFTER, aux_weight=0.01, **_LR)
        found[f"{by}, after"] = done.bits_per_byte
    return found


@torch.no_grad()
def _scaled(lm: LM) -> LM:
    """The experts' outputs times N / K; afterwards, for training, the model has them too."""
    for block in lm.blocks:
        block.ff.bank.down.mul_(_EXPERTS / _TOP_K)  # pyrefly: ignore[missing-attribute]
    return lm
