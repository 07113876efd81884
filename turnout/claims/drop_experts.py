"""Claim: REAP's score says which experts to drop, better than their gates, how often they are used, or chance."""

import statistics
from typing import Any

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.taught import EXPERTS, STEPS, TOP_K, UNEVEN, sample, score, taught
from turnout.models import LM
from turnout.reshape.to_smaller.drop_experts import drop_experts as reshape
from turnout.reshape.to_smaller.merge_experts import merge_experts

_KEEP = EXPERTS // 2
_DRAWS = 5  # of random experts: the mean, so that the luck of one draw is not the control
_REGIMES = {"even": "load balanced by a bias", "uneven": "load left uneven"}


def drop_experts() -> Claim:
    """With half of the experts dropped, REAP leaves fewer held-out bits per byte than what it is made of, or chance.

    The off arm is REAP without the length of the experts' outputs: the mean gate alone. The paper's own comparisons,
    with frequency and with merging, are made on balanced models and on such whose load an auxiliary loss left uneven.

    >>> drop_experts().off
    'the mean gate alone'

    Source: Lasby et al., 2025, "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression".
    """
    bits, draws = "held-out bits per byte", f"random experts, mean of {_DRAWS} draws"
    controls = {"frequency": "the least used experts", "merged": "merged to as many (M-SMoE)"}
    headline = (
        Row(f"{bits}, {words}", "below", f"reap, {regime}", f"{name}, {regime}", against, headline=True)
        for regime, words in _REGIMES.items()
        for name, against in controls.items()
    )
    return Claim(
        name="drop_experts",
        statement="Dropping half of the experts by REAP's score costs less than by their gates or by chance; less than "
        "by frequency, and than merging.",
        source="Lasby et al., 2025, REAP the Experts",
        off="the mean gate alone",
        switched={f"reap, {regime}": f"gate, {regime}" for regime in _REGIMES},
        rows=(
            *(
                Row(f"{bits}, {words}", "below", f"reap, {regime}", f"gate, {regime}", "the mean gate alone")
                for regime, words in _REGIMES.items()
            ),
            Row(f"{bits}, {_REGIMES['even']}", "below", "reap, even", "random, even", draws),
            *headline,
        ),
        measure=_measure,
        seconds=20,
        note=f"2 layers, width 64, {EXPERTS} experts, top {TOP_K}, {STEPS} steps of 1,024 tokens; {_KEEP} experts "
        f"left, no training after. Uneven: an auxiliary loss of {UNEVEN}",
    )


def _measure(seed: int) -> Values:
    found = {}
    for regime in _REGIMES:
        lm = taught(seed, routed=True, even=regime == "even")
        found |= {f"{name}, {regime}": value for name, value in _left(lm, seed).items()}
    return found


def _left(lm: LM, seed: int) -> Values:
    """Bits per byte of the models of half as many experts, by how they were chosen."""
    text, found = sample(seed), {"whole": score(lm)}
    arms: dict[str, Any] = dict.fromkeys(("reap", "gate", "frequency"), (seed,)) | {"random": range(_DRAWS)}
    for by, draws in arms.items():
        smaller = [reshape(lm, keep=_KEEP, by=by, batches=text, seed=draw)[0] for draw in draws]  # type: ignore[arg-type]
        found[by] = statistics.fmean(map(score, smaller))
    return found | {"merged": score(merge_experts(lm, keep=_KEEP, batches=text)[0])}
