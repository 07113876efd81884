"""Claim: experts that share the maps on the side of the width learn more than ones of as many weights that do not."""

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import OUT, WIDTH, Clusters, fitted, layer
from turnout.decide.token import TopK
from turnout.paths import FactoredBank

_EXPERTS, _K, _HIDDEN, _LATENT, _STEPS, _CLUSTERS = 16, 2, 24, 12, 600, 32


def latent_trained() -> Claim:
    """Held-out error of experts whose first maps share their input side, trained from scratch.

    The functions to be learned look at 12 of 32 directions, all at the same. Controls: the shared map drawn and frozen;
    whole experts of as many weights; and functions that look in all directions.

    >>> latent_trained().off
    'the shared map frozen as it was drawn'

    Source: Liu et al., 2025, "Mixture of Latent Experts" (MoLE), trained from scratch.
    """
    error = "held-out error / variance"
    return Claim(
        name="latent_trained",
        statement="Where experts look at common directions, sharing the maps that find these learns more than whole "
        "experts of as many weights.",
        source="Liu et al., 2025, Mixture of Latent Experts",
        off="the shared map frozen as it was drawn",
        switched={"shared": "frozen"},
        rows=(
            Row(error, "below", "shared", "frozen", "the shared map frozen as it was drawn"),
            Row(error, "below", "shared", "small", "whole experts of as many weights", headline=True),
        ),
        measure=_measure,
        seconds=30,
        note=f"regression, {_CLUSTERS} clusters, {_EXPERTS} experts of {_HIDDEN} units, {_LATENT} of {WIDTH} "
        f"directions, {_STEPS} steps of 512",
    )


def _measure(seed: int) -> Values:
    data = Clusters(seed, count=_CLUSTERS, inside=_LATENT)
    shared = WIDTH * _LATENT + _EXPERTS * (_LATENT * _HIDDEN + _HIDDEN * OUT)
    small = round(shared / _EXPERTS / (WIDTH + OUT))
    sizes = {"up_rank": _LATENT, "down_rank": 0, "share": _EXPERTS, "up_rows": 0, "down_rows": _EXPERTS * WIDTH}
    return {
        "shared": _run(seed, data, _HIDDEN, sizes),
        "frozen": _run(seed, data, _HIDDEN, sizes, freeze=True),
        "small": _run(seed, data, small, None),
    }


def _run(seed: int, data: Clusters, hidden: int, sizes: dict[str, int] | None, *, freeze: bool = False) -> float:
    router = TopK(WIDTH, _EXPERTS, top_k=_K, std=0.05, generator=torch.Generator().manual_seed(seed))
    made = layer(router, hidden=hidden, seed=seed, **({} if sizes is None else {"factored": sizes}))
    if freeze:
        bank = made.bank
        assert isinstance(bank, FactoredBank)
        first: Tensor = next(p for name, p in bank.named_parameters() if p.shape[-1] == WIDTH)
        first.requires_grad_(False)
    return fitted(made, data, seed=seed, steps=_STEPS, batch=512, aux=0.01, skip=False).fvu
