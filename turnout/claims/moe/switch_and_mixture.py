"""Claim: all experts of a token lie in one group, and what is asked for keeps others from beating them."""

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Fitted, fitted, layer
from turnout.claims.moe.fine_experts import Halves
from turnout.decide.token import SAM, Switch, TopK
from turnout.types import Routing

_EXPERTS, _GROUPS, _K, _STEPS = 64, 8, 4, 400


def switch_and_mixture() -> Claim:
    """How many groups a token's experts lie in, how many experts elsewhere beat them, and the held-out errors.

    >>> switch_and_mixture().off
    'the largest anywhere; no alignment'

    Source: Jiang et al., 2021, "SAM: Switch and Mixture routing".
    """
    error = "held-out error / variance"
    return Claim(
        name="switch_and_mixture",
        statement="Top-k within one group of experts sends a token to one device, and its alignment loss leaves few "
        "better experts elsewhere.",
        source="Jiang et al., 2021, SAM",
        off="the largest anywhere; no alignment",
        switched={"groups": "groups, anywhere", "beaten": "beaten, none"},
        rows=(
            Row("groups a token's experts lie in", "below", "groups", "groups, anywhere", "the largest anywhere"),
            Row("probability by which others beat the chosen", "below", "beaten", "beaten, none", "no alignment"),
            Row(error, "below", "anywhere", "switch", "Switch with experts four times the size", headline=True),
            Row(error, "below", "sam", "switch", "Switch with experts four times the size", headline=True),
        ),
        measure=_measure,
        seconds=40,
        note=f"regression on the sum of two functions, {_EXPERTS} experts of 6 units in {_GROUPS} groups, top {_K}, "
        f"{_STEPS} steps of 256",
    )


def _measure(seed: int) -> Values:
    found: dict[str, Fitted] = {}
    for name in ("sam", "none", "anywhere", "switch"):
        start = torch.Generator().manual_seed(seed)
        if name == "switch":
            router, hidden = Switch(WIDTH, 16, jitter=0.0, capacity_factor=None, generator=start), 24
        elif name == "anywhere":
            router, hidden = TopK(WIDTH, _EXPERTS, top_k=_K, renormalize=False, generator=start), 6
        else:
            weight = 1.0 if name == "sam" else 0.0
            router, hidden = SAM(WIDTH, _EXPERTS, top_k=_K, num_groups=_GROUPS, alignment=weight, generator=start), 6
        made = layer(router, hidden=hidden, seed=seed)
        found[name] = fitted(made, Halves(seed), seed=seed, steps=_STEPS, aux=0.01, skip=False)
    return {
        "groups": _groups(found["sam"].routing),
        "groups, anywhere": _groups(found["anywhere"].routing),
        "beaten": _beaten(found["sam"].routing),
        "beaten, none": _beaten(found["none"].routing),
        **{name: found[name].fvu for name in ("sam", "anywhere", "switch")},
    }


def _groups(routing: Routing) -> float:
    """How many groups a token's experts lie in, the mean."""
    there_TG = (routing.dense() > 0).unflatten(1, (_GROUPS, -1)).any(2)
    return float(there_TG.double().sum(1).mean())


def _beaten(routing: Routing) -> float:
    """By how much experts that do not run beat the least of those that do, the mean over tokens of the sum."""
    score_TE, weight_TE = routing.score_TE, routing.dense()
    assert score_TE is not None
    least_T1 = weight_TE.masked_fill(weight_TE == 0, 2.0).amin(1, keepdim=True)
    return float((score_TE - least_T1).relu().masked_fill(weight_TE > 0, 0.0).sum(1).mean())
