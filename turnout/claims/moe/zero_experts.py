"""Claim: experts that compute nothing take the tokens that need least, and save products at no significant loss."""

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import OUT, WIDTH, Clusters, Fitted, fitted, layer
from turnout.decide.token import MoEPlusPlus, TopK

_EXPERTS, _K, _STEPS, _BETA = 16, 2, 500, 0.1
_FREE = {"constant": 2, "copy": 1, "zero": 1}


class _Uneven(Clusters):
    """Half of the clusters have one linear target for all; the others a function each."""

    def __init__(self, seed: int) -> None:
        super().__init__(seed)
        self.plain_DO = torch.randn(WIDTH, OUT, generator=torch.Generator().manual_seed(seed + 9)) / WIDTH**0.5

    def draw(self, tokens: int, chance: torch.Generator, cluster_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if cluster_T is None:
            cluster_T = torch.multinomial(self.share_C, tokens, True, generator=chance)
        x_TD, y_TO = super().draw(tokens, chance, cluster_T)
        self.is_plain_T = cluster_T < len(self.share_C) // 2  # of the batch that was drawn last
        return x_TD, torch.where(self.is_plain_T[:, None], x_TD @ self.plain_DO, y_TO)


def zero_experts() -> Claim:
    """Feed-forward experts a token, and on which tokens, of MoE++ and of top-2 over as many such experts.

    >>> zero_experts().off
    'no zero-computation experts; tau 1'

    Source: Jin et al., 2024, "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts", tables 3
    to 5 and figure 4.
    """
    return Claim(
        name="zero_experts",
        statement="With experts that compute nothing under one router, a token runs fewer feed-forward experts, and "
        "loses nothing that matters.",
        source="Jin et al., 2024, MoE++",
        off="no zero-computation experts; tau 1",
        switched={"run": "run, vanilla", "run, low tau": "run"},
        rows=(
            Row("feed-forward experts a token", "below", "run", "run, vanilla", "top-2 of ordinary experts"),
            Row("feed-forward experts a token", "below", "run, low tau", "run", "tau 0.75 in place of 0.25"),
            Row("held-out error / variance", "no_worse", "error", "error, vanilla", "top-2 of ordinary experts",
                margin=0.05, why="a twentieth of what is to be explained", headline=True),
            Row("feed-forward experts, easy tokens", "below", "run, easy", "run, hard", "hard tokens", headline=True),
        ),
        measure=_measure,
        seconds=30,
        note=f"regression, half of 16 clusters linear, {_EXPERTS} experts of 24 units and {sum(_FREE.values())} that "
        f"compute nothing, top {_K}, weight {_BETA}, {_STEPS} steps of 256",
    )  # fmt: skip


def _measure(seed: int) -> Values:
    vanilla = _run(seed, None)
    even, low = _run(seed, 0.75), _run(seed, 0.25)
    run_T, data = _each(even), _Uneven(seed)
    data.draw(len(run_T), torch.Generator().manual_seed(9))  # as it was tested
    return {
        "run": float(run_T.mean()),
        "run, low tau": float(_each(low).mean()),
        "run, vanilla": float(_each(vanilla).mean()),
        "error": even.fvu,
        "error, vanilla": vanilla.fvu,
        "run, easy": float(run_T[data.is_plain_T].mean()),
        "run, hard": float(run_T[~data.is_plain_T].mean()),
    }


def _run(seed: int, tau: float | None) -> Fitted:
    start = torch.Generator().manual_seed(seed)
    if tau is None:
        return fitted(layer(TopK(WIDTH, _EXPERTS, generator=start), seed=seed), _Uneven(seed), seed=seed, steps=_STEPS,
                      aux=_BETA)  # fmt: skip
    free, sizes = sum(_FREE.values()), {"top_k": _K, "balance": _BETA * _EXPERTS / _K}
    router = MoEPlusPlus(WIDTH, _EXPERTS + free, free=free, zero=1, tau=tau, **sizes, generator=start)
    made = layer(router, seed=seed, zero_computation=_FREE)
    return fitted(made, _Uneven(seed), seed=seed, steps=_STEPS)


def _each(one: Fitted) -> Tensor:
    """(T,) how many feed-forward experts each token runs."""
    return (one.routing.dense()[:, :_EXPERTS] > 0).double().sum(1)
