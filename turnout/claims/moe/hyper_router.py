"""Claim: a router that a fixed network makes of a vector learns through that vector."""

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Clusters, fitted, layer
from turnout.decide.token import HyperRouter, TopK

_EXPERTS, _STEPS = 16, 500


def hyper_router() -> Claim:
    """Held-out error with the embedding trained and frozen; a router that is learned directly is the headline.

    >>> hyper_router().off
    'the embedding frozen'

    Source: Do et al., 2023, "HyperRouter: Towards Efficient Training and Inference of Sparse Mixture of Experts", table
    1.
    """
    error = "held-out error / variance"
    return Claim(
        name="hyper_router",
        statement="What a fixed hypernetwork makes of a trained embedding routes better than what it makes of a fixed "
        "one.",
        source="Do et al., 2023, HyperRouter",
        off="the embedding frozen",
        switched={"trained": "frozen"},
        rows=(
            Row(error, "below", "trained", "frozen", "the embedding frozen"),
            Row(error, "below", "trained", "learned", "a router learned directly, with a balance loss", headline=True),
        ),
        measure=_measure,
        seconds=20,
        note=f"regression, 16 clusters, {_EXPERTS} experts of 24 units, top 2, {_STEPS} steps of 256, Adam 0.01",
    )


def _measure(seed: int) -> Values:
    found, data = {}, Clusters(seed)
    for name in ("trained", "frozen", "learned"):
        start = torch.Generator().manual_seed(seed)
        router = (TopK if name == "learned" else HyperRouter)(WIDTH, _EXPERTS, generator=start)
        if name == "frozen":
            router.requires_grad_(False)
        aux = 0.01 if name == "learned" else 0.0
        found[name] = fitted(layer(router, seed=seed), data, seed=seed, steps=_STEPS, lr=1e-2, aux=aux).fvu
    return found
