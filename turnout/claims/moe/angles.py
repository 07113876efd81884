"""Claim: a router of angles does not see how long a token is, and is no worse."""

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Clusters, Fitted, fitted, layer
from turnout.decide.token import TopK, XMoE

_EXPERTS, _STEPS = 16, 500


def angles() -> Claim:
    """How much the weights of a trained router change where its inputs are three times as long; held-out errors.

    >>> angles().off
    'a linear router'

    Source: Chi et al., 2022, "On the Representation Collapse of Sparse Mixture of Experts" (X-MoE), section 3.
    """
    return Claim(
        name="angles",
        statement="A router by cosines in few dimensions does not depend on the lengths of tokens.",
        source="Chi et al., 2022, X-MoE",
        off="a linear router",
        switched={"changed": "changed, linear"},
        rows=(
            Row("change of the weights, inputs times 3", "within", "changed", "changed, linear", "a linear router",
                bound=1e-3),
            Row("held-out error / variance", "no_worse", "error", "error, linear", "a linear router", margin=0.03,
                why="a thirtieth of what is to be explained", headline=True),
        ),
        measure=_measure,
        seconds=15,
        note=f"regression, 16 clusters, {_EXPERTS} experts of 24 units, top 2, 8 dimensions, {_STEPS} steps of 256",
    )  # fmt: skip


def _measure(seed: int) -> Values:
    found: dict[str, Fitted] = {}
    for name in ("angles", "linear"):
        start = torch.Generator().manual_seed(seed)
        router = (XMoE if name == "angles" else TopK)(WIDTH, _EXPERTS, generator=start)
        if isinstance(router, XMoE):
            router.projection_bias.requires_grad_(False)
        found[name] = fitted(layer(router, seed=seed), Clusters(seed), seed=seed, steps=_STEPS, aux=0.01)
    return {
        "changed": _changed(found["angles"], seed),
        "changed, linear": _changed(found["linear"], seed),
        "error": found["angles"].fvu,
        "error, linear": found["linear"].fvu,
    }


@torch.no_grad()
def _changed(one: Fitted, seed: int) -> float:
    x_TD, _ = Clusters(seed).draw(2048, torch.Generator().manual_seed(5))
    score_TE, other_TE = (one.layer(each).routing.score_TE for each in (x_TD, 3 * x_TD))
    assert score_TE is not None and other_TE is not None
    return float((score_TE - other_TE).abs().sum(1).mean())
