"""Claim: one expert of each prototype, side by side; whether that teaches more is the headline."""

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Fitted, fitted, layer
from turnout.claims.moe.fine_experts import Halves
from turnout.decide.token import Prototyping, TopK
from turnout.types import Routing

_EXPERTS, _K, _STEPS = 16, 2, 500


def prototypes() -> Claim:
    """The share of tokens whose two experts lie in one half of the experts, and the held-out errors.

    >>> prototypes().off
    'the two largest anywhere'

    Source: Yang et al., 2021, "M6-T: Exploring Sparse Expert Models and Beyond", section 3.
    """
    error = "held-out error / variance"
    return Claim(
        name="prototypes",
        statement="k top-1 takes one expert of every prototype, whatever the scores.",
        source="Yang et al., 2021, M6-T",
        off="the two largest anywhere",
        switched={"same": "same, anywhere"},
        rows=(
            Row("tokens with both experts in one half", "below", "same", "same, anywhere", "the two largest anywhere"),
            Row(error, "below", "error", "raw", "the two largest anywhere, not normalised", headline=True),
        ),
        measure=_measure,
        seconds=20,
        note=f"regression on the sum of two functions, {_EXPERTS} experts of 24 units, {_STEPS} steps of 256",
    )


def _measure(seed: int) -> Values:
    found: dict[str, Fitted] = {}
    for name in ("error", "raw"):
        start = torch.Generator().manual_seed(seed)
        router = Prototyping(WIDTH, _EXPERTS, top_k=_K, generator=start)
        if name == "raw":
            router = TopK(WIDTH, _EXPERTS, top_k=_K, renormalize=False, generator=start)
        found[name] = fitted(layer(router, seed=seed), Halves(seed), seed=seed, steps=_STEPS, aux=0.01, skip=False)
    return {
        "same": _same(found["error"].routing),
        "same, anywhere": _same(found["raw"].routing),
        **{name: one.fvu for name, one in found.items()},
    }


def _same(routing: Routing) -> float:
    """The share of tokens both of whose experts lie in one half of them."""
    there_T2 = (routing.dense() > 0).unflatten(1, (_K, -1)).any(2)
    return float((there_T2.sum(1) == 1).double().mean())
