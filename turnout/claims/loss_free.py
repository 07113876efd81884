"""Claim: a bias on the scores balances the load better than an auxiliary loss does, at no cost in quality."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.trial import small, trial
from turnout.models.lm import MoEConfig

_STEPS, _TOP_K, _HIDDEN, _EXPERTS = 300, 2, 96, 8
# The paper's update rate 0.001 is for 10^5 steps; over 300 the bias could move by 0.3 of a score at most.
# 0.01 keeps rate x steps within the range of a sigmoid score, as the paper's own sweep does.
_RATE = 0.01
# The paper's 0.001 does nothing in 300 steps (MaxVio 1.5), so it would be no match: Switch's 0.01 for each of 2 layers.
_AUX = 0.02
# Name -> update rate of the bias, weight of the auxiliary loss.
_ARMS = {"bias": (_RATE, 0.0), "off": (0.0, 0.0), "loss": (0.0, _AUX)}


def loss_free() -> Claim:
    """Loss-free balancing reaches a better MaxVio than the auxiliary loss, with no worse bits per byte.

    Three arms on the same batches: the bias updated; the bias update off; no bias, but the auxiliary loss.

    >>> loss_free().off
    'no bias update'

    Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", table 2. Sigmoid
    scores in every arm, as there; the rate is 0.01, not 0.001, and the auxiliary weight 0.01 a layer, not 0.001.
    """
    bits, why = "held-out bits per byte", "a few steps of training more are worth as much"
    return Claim(
        name="loss_free",
        statement="A score bias nudged by observed load balances better than an auxiliary loss, with no worse quality.",
        source="Wang et al., 2024, Auxiliary-Loss-Free Load Balancing",
        off="no bias update",
        switched={"bias": "off", "bias bits": "off bits"},
        rows=(
            Row("MaxVio", "below", "bias", "off", "no bias update"),
            Row("MaxVio", "below", "bias", "loss", "auxiliary loss", headline=True),
            Row(bits, "no_worse", "bias bits", "loss bits", "auxiliary loss", margin=0.02, why=why, headline=True),
        ),
        measure=_measure,
        seconds=25,
        note=f"2 layers, width 64, {_EXPERTS} experts, top {_TOP_K}, {_STEPS} steps of 1,024 tokens, rate {_RATE}",
    )


def _measure(seed: int) -> Values:
    found = {}
    for name, (rate, aux) in _ARMS.items():
        options: dict[str, object] = {"rate": rate}
        moe = MoEConfig(_EXPERTS, _TOP_K, _HIDDEN, router="LossFree", router_options=options)
        run = trial(small(moe, hidden=_TOP_K * _HIDDEN), seed=seed, steps=_STEPS, aux_weight=aux, z_weight=0.0)
        found |= {name: run.max_vio, f"{name} bits": run.bits_per_byte}
    return found
