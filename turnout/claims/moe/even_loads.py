"""Claim: an even assignment of tokens to experts, the best there is, is exact and teaches the experts."""

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import WIDTH, Clusters, Fitted, fitted, layer, max_vio
from turnout.decide.token import BASE, Switch
from turnout.types import Routing

_EXPERTS, _STEPS = 8, 500


class _Dealt(BASE):
    """As many tokens an expert, by chance."""

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        if not self.training:
            return super().forward(x_TD)
        logit_TE = self.logits(x_TD)
        score_TE = logit_TE.sigmoid()
        index_T1 = (torch.randperm(len(x_TD), generator=generator) % self.num_experts)[:, None]
        return self.taken(index_T1, score_TE.gather(1, index_T1), score_TE, logit_TE)


def even_loads() -> Claim:
    """BASE's training load is exactly even, and what its assignment chooses teaches, against one dealt out by chance.

    16 clusters of unequal frequency, 8 experts, one a token; held out each token goes to its best expert.

    >>> even_loads().off
    'as many tokens an expert, by chance; each to its best expert'

    Source: Lewis et al., 2021, "BASE Layers: Simplifying Training of Large, Sparse Models", section 3.
    """
    error = "held-out error / variance"
    return Claim(
        name="even_loads",
        statement="Tokens dealt out evenly for the largest sum of affinities keep every expert's load exactly even in "
        "training, and the experts learn.",
        source="Lewis et al., 2021, BASE Layers",
        off="as many tokens an expert, by chance; each to its best expert",
        switched={"base": "dealt", "vio": "greedy vio"},
        rows=(
            Row(error, "below", "base", "dealt", "as many tokens an expert, by chance"),
            Row("MaxVio in training", "within", "vio", "greedy vio", "each token to its best expert", bound=1e-9),
            Row(error, "below", "base", "switch", "Switch with a balance loss", headline=True),
        ),
        measure=_measure,
        seconds=25,
        note=f"regression, 16 clusters of unequal frequency, {_EXPERTS} experts of 24 units, {_STEPS} steps of 256",
    )


def _measure(seed: int) -> Values:
    data, start = Clusters(seed, skew=0.7), {"generator": torch.Generator().manual_seed(seed)}
    base = _run(BASE(WIDTH, _EXPERTS, std=0.1 / WIDTH**0.5, **start), data, seed)
    dealt = _run(_Dealt(WIDTH, _EXPERTS, std=0.1 / WIDTH**0.5, **start), data, seed)
    switch = _run(Switch(WIDTH, _EXPERTS, jitter=0.0, capacity_factor=None, **start), data, seed, aux=0.01)
    vio = max(max_vio(routing) for routing in base.trained)
    return {"base": base.fvu, "dealt": dealt.fvu, "switch": switch.fvu, "vio": vio, "greedy vio": max_vio(base.routing)}


def _run(router: BASE | Switch, data: Clusters, seed: int, aux: float = 0.0) -> Fitted:
    return fitted(layer(router, seed=seed), data, seed=seed, steps=_STEPS, aux=aux, keep=50)
