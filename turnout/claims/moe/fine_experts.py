"""Claim: finer experts, some of them shared, learn more with as many weights and products."""

import math

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Clusters, fitted, layer
from turnout.decide.token import TopK
from turnout.models import MoEConfig

_STEPS = 500
_COARSE = MoEConfig(num_experts=8, top_k=2, hidden=48)


class Halves:
    """y is the sum of two functions, each of one half of x and of the cluster of that half."""

    def __init__(self, seed: int) -> None:
        self.parts = [Clusters(2 * seed + part, count=8) for part in (0, 1)]
        half = WIDTH // 2
        for part in self.parts:
            part.centre_CD[:, half:] = 0
            part.up_CDH[:, half:] = 0
            part.up_CDH *= math.sqrt(2)
        self.centre_CD = self.parts[0].centre_CD

    def draw(self, tokens: int, chance: torch.Generator) -> tuple[Tensor, Tensor]:
        """(T, D) inputs and (T, O) targets."""
        (a_TD, a_TO), (b_TD, b_TO) = (part.draw(tokens, chance) for part in self.parts)
        half = WIDTH // 2
        return torch.cat([a_TD[:, :half], b_TD[:, :half]], 1), a_TO + b_TO


def fine_experts() -> Claim:
    """8 experts of 48 units, top 2, against 32 of 12, top 8, and 30 of 12, top 6, with a shared one of 24.

    >>> fine_experts().off
    'not segmented, none shared'

    Source: Dai et al., 2024, "DeepSeekMoE: Towards Ultimate Expert Specialization in Mixture-of-Experts Language
    Models", figure 3 and table 1.
    """
    error = "held-out error / variance"
    return Claim(
        name="fine_experts",
        statement="Finer experts with a shared one learn more than few large ones, with as many weights and products.",
        source="Dai et al., 2024, DeepSeekMoE",
        off="not segmented, none shared",
        switched={"fine and shared": "coarse"},
        rows=(
            Row(error, "below", "fine and shared", "coarse", "8 experts of 48, top 2"),
            Row(error, "below", "fine and shared", "fine", "32 experts of 12, top 8", headline=True),
        ),
        measure=_measure,
        seconds=25,
        note=f"regression on the sum of two functions of two halves of x, {_STEPS} steps of 256; normalised top-k",
    )


def _measure(seed: int) -> Values:
    found = {}
    for name, moe in (("coarse", _COARSE), ("fine", _COARSE.fine(4, 0)), ("fine and shared", _COARSE.fine(4, 2))):
        start = torch.Generator().manual_seed(seed)
        router = TopK(WIDTH, moe.num_experts, top_k=moe.top_k, generator=start)
        made = layer(router, hidden=moe.hidden, seed=seed, shared_hidden=moe.shared_hidden)
        found[name] = fitted(made, Halves(seed), seed=seed, steps=_STEPS, aux=0.01, skip=False).fvu
    return found
