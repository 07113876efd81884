"""Claim: asked for certainty, a router that takes a share of the probability takes fewer experts at no more error."""

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Clusters, Fitted, fitted, layer
from turnout.decide.token import TopK, TopP

_EXPERTS, _STEPS, _ENTROPY, _P = 16, 500, 3e-2, 0.4


def top_p() -> Claim:
    """Experts a token with and without the entropy loss, and the held-out errors.

    >>> top_p().off
    'no entropy loss'

    Source: Huang et al., 2024, "Harder Tasks Need More Experts: Dynamic Routing in MoE Models", sections 3.2 and 4.
    """
    error = "held-out error / variance"
    return Claim(
        name="top_p",
        statement="An entropy loss makes top-p take fewer experts a token, with no more error.",
        source="Huang et al., 2024, Harder Tasks Need More Experts",
        off="no entropy loss",
        switched={"experts": "experts, none"},
        rows=(
            Row("experts a token", "below", "experts", "experts, none", "no entropy loss"),
            Row(error, "no_worse", "error", "error, none", "no entropy loss", margin=0.03, headline=True,
                why="a thirtieth of what is to be explained"),
            Row(error, "below", "error", "top-2", "top-2", headline=True),
        ),
        measure=_measure,
        seconds=20,
        note=f"regression, 16 clusters, {_EXPERTS} experts of 24 units, P {_P}, entropy {_ENTROPY}, {_STEPS} steps",
    )  # fmt: skip


def _measure(seed: int) -> Values:
    found: dict[str, Fitted] = {}
    for name in ("asked", "none", "top-2"):
        start = torch.Generator().manual_seed(seed)
        if name == "top-2":
            router = TopK(WIDTH, _EXPERTS, renormalize=False, generator=start)
        else:
            entropy = _ENTROPY if name == "asked" else 0.0
            router = TopP(WIDTH, _EXPERTS, threshold=_P, entropy=entropy, generator=start)
        found[name] = fitted(layer(router, seed=seed), Clusters(seed), seed=seed, steps=_STEPS, aux=0.01, skip=False)
    each = {name: one.routing.num_entries / one.routing.num_tokens for name, one in found.items()}
    return {
        "experts": each["asked"],
        "experts, none": each["none"],
        "error": found["asked"].fvu,
        "error, none": found["none"].fvu,
        "top-2": found["top-2"].fvu,
    }
