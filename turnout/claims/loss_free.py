"""Claim: a bias on the scores balances the load as well as an auxiliary loss does, at no cost in quality."""

import time

from turnout.claims.claim import Claim, Evidence
from turnout.claims.trial import SEEDS, Note, Trial, small, trial
from turnout.models.lm import MoEConfig

_STEPS, _TOP_K, _HIDDEN, _EXPERTS = 300, 2, 96, 8
# The paper's update rate 0.001 is for 10^5 steps; over 300 the bias could move by 0.3 of a score at most.
# 0.01 keeps rate x steps within the range of a sigmoid score, as the paper's own sweep does.
_RATE = 0.01
# The paper's 0.001 does nothing in 300 steps (MaxVio 1.5), so it would be no match: Switch's 0.01 for each of 2 layers.
_AUX = 0.02


def loss_free(*, note: Note = None) -> Claim:
    """Loss-free balancing reaches the auxiliary loss's MaxVio or better, with no worse bits per byte.

    Three arms on the same batches: the bias updated; the bias update off; no bias, but the auxiliary loss.

    >>> loss_free.__name__  # the run itself takes a minute and a half: turnout verify loss_free
    'loss_free'

    Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", table 2
    (seed 20). Sigmoid scores in every arm, as there; the rate is 0.01, not 0.001, and the auxiliary weight
    0.01 a layer, not 0.001.
    """
    began = time.perf_counter()

    def arm(seed: int, name: str, rate: float, aux: float) -> Trial:
        moe = MoEConfig(
            num_experts=_EXPERTS, top_k=_TOP_K, hidden=_HIDDEN, router="LossFree", router_options={"rate": rate}
        )
        model = small(moe, hidden=_TOP_K * _HIDDEN)
        return trial(model, seed=seed, steps=_STEPS, note=note, name=name, aux_weight=aux, z_weight=0.0)

    bias = [arm(seed, "bias", _RATE, 0.0) for seed in SEEDS]
    off = [arm(seed, "bias update off", 0.0, 0.0) for seed in SEEDS]
    loss = [arm(seed, "auxiliary loss", 0.0, _AUX) for seed in SEEDS]

    def pair(metric: str, field: str, relation: str, control: list[Trial], name: str) -> Evidence:
        values = tuple(getattr(run, field) for run in bias), tuple(getattr(run, field) for run in control)
        return Evidence(metric, relation, *values, name)  # pyrefly: ignore[bad-argument-type]

    return Claim(
        name="loss_free",
        statement="A score bias nudged by observed load balances as well as the auxiliary loss, with no worse quality.",
        source="Wang et al., 2024, Auxiliary-Loss-Free Load Balancing (seed 20)",
        evidence=(
            pair("MaxVio", "max_vio", "below", off, "bias update off"),
            pair("MaxVio", "max_vio", "not_above", loss, "auxiliary loss"),
            pair("held-out bits per byte", "bits_per_byte", "not_above", loss, "auxiliary loss"),
        ),
        seconds=time.perf_counter() - began,
        note=f"2 layers, width 64, {_EXPERTS} experts, top {_TOP_K}, {_STEPS} steps of 1,024 tokens, rate {_RATE}",
    )
