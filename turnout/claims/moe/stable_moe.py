"""Claim: once the distilled router decides, no token's expert changes any more."""

import itertools

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Clusters, fitted, layer
from turnout.decide.token import StableMoE
from turnout.layers import MoE

_EXPERTS, _STEPS, _FREEZE, _EVERY, _CLUSTERS = 8, 400, 120, 50, 16


def stable_moe() -> Claim:
    """The share of 2,048 fixed inputs whose expert changes within 50 steps, from the second half of the run on.

    >>> stable_moe().off
    'stage 1 to the end'

    Source: Dai et al., 2022, "StableMoE: Stable Routing Strategy for Mixture of Experts", figures 1 and 3, table 2.
    """
    return Claim(
        name="stable_moe",
        statement="After the distilled router has taken over, inputs keep their experts while the layer goes on "
        "learning.",
        source="Dai et al., 2022, StableMoE",
        off="stage 1 to the end",
        switched={"frozen": "moving"},
        rows=(
            Row("inputs that change their expert in 50 steps", "below", "frozen", "moving", "stage 1 to the end"),
            Row("held-out error / variance", "below", "error", "error, moving", "stage 1 to the end", headline=True),
        ),
        measure=_measure,
        seconds=15,
        note=f"regression, {_CLUSTERS} clusters of unequal frequency that ids tell apart, {_EXPERTS} experts, {_STEPS} "
        f"steps of 256, frozen after {_FREEZE}",
    )


def _measure(seed: int) -> Values:
    found, data = {}, Clusters(seed, count=_CLUSTERS, skew=0.7)
    x_TD, _ = data.draw(2048, torch.Generator().manual_seed(5))
    id_T = torch.cdist(x_TD, data.centre_CD).argmin(1)
    for name, after in (("frozen", _FREEZE), ("moving", 10 * _STEPS)):
        start = torch.Generator().manual_seed(seed)
        sizes = {"vocab_size": _CLUSTERS, "freeze_after": after}
        router = StableMoE(WIDTH, _EXPERTS, **sizes, std=0.1 / WIDTH**0.5, generator=start)
        seen: list[torch.Tensor] = []

        def look(step: int, one: MoE, seen: list[torch.Tensor] = seen) -> None:
            if step >= _STEPS // 2 and step % _EVERY == 0:
                with torch.no_grad():
                    seen.append(one.eval()(x_TD, token_id=id_T).routing.dense().argmax(1))
                one.train()

        run = fitted(layer(router, seed=seed), data, seed=seed, steps=_STEPS, look=look)
        moved = [float((a != b).double().mean()) for a, b in itertools.pairwise(seen)]
        found |= {name: sum(moved) / len(moved), "error" if name == "frozen" else "error, moving": run.fvu}
    return found
