"""Claim: codes that are asked to move to their tokens do, and route as well as most of a learned gate."""

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Clusters, Fitted, fitted, layer
from turnout.decide.token import VQ, TopK

_EXPERTS, _STEPS, _NOISE = 16, 400, 0.3


def discrete_codes() -> Claim:
    """How far inputs are from their code, held-out errors, and how many inputs change their expert under noise.

    >>> discrete_codes().off
    'nothing is asked of the codes'

    Source: Do et al., 2024, "On the Role of Discrete Representation in Sparse Mixture of Experts" (VQMoE), tables 1 and
    4.
    """
    error = "held-out error / variance"
    return Claim(
        name="discrete_codes",
        statement="Codes asked to be near their tokens route, without a learned gate, better than codes by chance.",
        source="Do et al., 2024, VQMoE",
        off="nothing is asked of the codes",
        switched={"codes": "fixed", "far": "far, fixed"},
        rows=(
            Row("squared distance to the code / variance", "below", "far", "far, fixed", "nothing is asked"),
            Row(error, "below", "codes", "fixed", "codes as they were drawn"),
            Row("inputs that change their expert", "below", "flips", "flips, top-1", "a learned top-1", headline=True),
        ),
        measure=_measure,
        seconds=15,
        note=f"regression, 16 clusters, {_EXPERTS} experts of 24 units, codes from normal vectors, {_STEPS} steps of "
        f"256; noise of {_NOISE}",
    )


def _measure(seed: int) -> Values:
    found: dict[str, Fitted] = {}
    for name in ("codes", "fixed", "top-1"):
        start = torch.Generator().manual_seed(seed)
        if name == "top-1":
            router = TopK(WIDTH, _EXPERTS, top_k=1, generator=start)
        else:
            asked = {"strength": 40.0 if name == "codes" else 0.0, "commitment": 0.0}
            router = VQ(WIDTH, _EXPERTS, std=1.0, **asked, generator=start)
        aux = 0.01 if name == "top-1" else 0.0
        found[name] = fitted(layer(router, seed=seed), Clusters(seed), seed=seed, steps=_STEPS, aux=aux)
    return {
        "codes": found["codes"].fvu,
        "fixed": found["fixed"].fvu,
        "far": _far(found["codes"], seed),
        "far, fixed": _far(found["fixed"], seed),
        "flips": _flips(found["codes"], seed),
        "flips, top-1": _flips(found["top-1"], seed),
    }


@torch.no_grad()
def _far(one: Fitted, seed: int) -> float:
    x_TD, _ = Clusters(seed).draw(2048, torch.Generator().manual_seed(5))
    logit_TE = one.layer(x_TD).routing.logit_TE
    assert logit_TE is not None
    return float(-logit_TE.amax(1).mean() / (x_TD - x_TD.mean(0)).square().sum(1).mean())


@torch.no_grad()
def _flips(one: Fitted, seed: int) -> float:
    chance = torch.Generator().manual_seed(5)
    x_TD, _ = Clusters(seed).draw(2048, chance)
    moved_TD = x_TD + _NOISE * torch.randn(x_TD.shape, generator=chance)
    before_T, after_T = (one.layer(each).routing.dense().argmax(1) for each in (x_TD, moved_TD))
    return float((before_T != after_T).double().mean())
