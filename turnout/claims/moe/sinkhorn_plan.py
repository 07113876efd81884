"""Claim: the choice of a transport plan is nearly even where the logits' own choice is not."""

from typing import Any

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Clusters, fitted, layer, max_vio
from turnout.decide.token import Sinkhorn, TopK
from turnout.types import Routing

_EXPERTS, _STEPS = 16, 300


def sinkhorn_plan() -> Claim:
    """MaxVio of the plan's choice and of the logits', for one router with a strong preference; and as it trains.

    >>> sinkhorn_plan().off
    'each token to its largest logit'

    Source: Clark et al., 2022, "Unified Scaling Laws for Routed Language Models", section 2 and appendix (S-BASE).
    """
    return Claim(
        name="sinkhorn_plan",
        statement="The largest entries of a balanced transport plan spread tokens nearly evenly over experts, with no "
        "loss for it.",
        source="Clark et al., 2022, Unified Scaling Laws for Routed Language Models",
        off="each token to its largest logit",
        switched={"plan": "logits", "trained": "trained greedily"},
        rows=(
            Row("MaxVio, a router that prefers some", "below", "plan", "logits", "the largest logits"),
            Row("MaxVio in training", "below", "trained", "trained greedily", "the largest logits"),
            Row("held-out error / variance", "below", "error", "switch", "top-1 with a balance loss", headline=True),
        ),
        measure=_measure,
        seconds=20,
        note=f"2,048 tokens and {_EXPERTS} experts, a preference of +-1.5; regression, {_STEPS} steps of 256",
    )


class _Greedy(Sinkhorn):
    """In training as in evaluation."""

    def forward(self, *arguments: Any, **keywords: Any) -> Routing:
        was, self.training = self.training, False
        try:
            return super().forward(*arguments, **keywords)
        finally:
            self.training = was


def _measure(seed: int) -> Values:
    chance = torch.Generator().manual_seed(seed)
    router = Sinkhorn(WIDTH + 1, _EXPERTS)
    with torch.no_grad():
        router.weight.normal_(0, 0.15, generator=chance)
        router.weight[:, -1] = 1.5 * torch.linspace(1, -1, _EXPERTS)
        x_TD = torch.cat([torch.randn(2048, WIDTH, generator=chance), torch.ones(2048, 1)], 1)
        found = {"plan": max_vio(router.train()(x_TD)), "logits": max_vio(router.eval()(x_TD))}
    data = Clusters(seed, skew=0.7)
    for name, kind, aux in (("trained", Sinkhorn, 0.0), ("trained greedily", _Greedy, 0.0), ("switch", TopK, 0.01)):
        start = torch.Generator().manual_seed(seed)
        made = layer(kind(WIDTH, _EXPERTS, top_k=1, generator=start), seed=seed)
        run = fitted(made, data, seed=seed, steps=_STEPS, aux=aux, keep=50)
        found[name] = run.fvu if name == "switch" else sum(map(max_vio, run.trained)) / len(run.trained)
        if name == "trained":
            found["error"] = run.fvu
    return found
