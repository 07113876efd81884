"""Claim: balance asked of a whole step, not of each micro-batch, leaves domains their experts and costs less."""

import math

import torch
from torch import Tensor, nn

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.moe.clustered import OUT, WIDTH, Clusters, layer
from turnout.decide.token import TopK
from turnout.train.balance import Whole, load_balance_loss
from turnout.types import Routing

_EXPERTS, _K, _STEPS, _DOMAINS, _EACH, _WEIGHT = 16, 2, 500, 8, 64, 0.1


def global_balance() -> Claim:
    """Held-out error, and how little the experts tell the domains, under a balance loss over micro-batches or steps.

    A step has 8 micro-batches of 64 inputs, each of one domain: 4 of 32 clusters.

    >>> global_balance().off
    'balance within each micro-batch'

    Source: Qiu et al., 2025, "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
    Mixture-of-Expert Models", tables 1 and 2.
    """
    return Claim(
        name="global_balance",
        statement="A balance loss over the whole step lets experts specialise in domains, with less error at the same "
        "weight.",
        source="Qiu et al., 2025, Demons in the Detail",
        off="balance within each micro-batch",
        switched={"step": "micro", "alike": "alike, micro"},
        rows=(
            Row("held-out error / variance", "below", "step", "micro", "balance within each micro-batch"),
            Row("1 - Jensen-Shannon of the domains' loads", "below", "alike", "alike, micro", "within micro-batches"),
            Row("held-out error / variance", "below", "step", "none", "no balance loss", headline=True),
        ),
        measure=_measure,
        seconds=20,
        note=f"regression, {_DOMAINS} domains of 4 clusters, one a micro-batch of {_EACH}; {_EXPERTS} experts of 24 "
        f"units, top {_K}, {_STEPS} steps, weight {_WEIGHT}",
    )


def _measure(seed: int) -> Values:
    found = {}
    for name, weight in (("step", _WEIGHT), ("micro", _WEIGHT), ("none", 0.0)):
        found[name], routing = _run(seed, weight, whole=name == "step")
        found["alike" if name == "step" else f"alike, {name}"] = 1 - _apart(routing)
    return found


def _batch(data: Clusters, chance: torch.Generator, each: int) -> tuple[Tensor, Tensor]:
    per = 32 // _DOMAINS
    cluster_DN = torch.randint(per, (_DOMAINS, each), generator=chance) + per * torch.arange(_DOMAINS)[:, None]
    return data.draw(0, chance, cluster_DN.flatten())


def _run(seed: int, weight: float, *, whole: bool) -> tuple[float, Routing]:
    """As the training loop does it with ``balance_scope``: micro-batches whose gradients are added up."""
    data, chance = Clusters(seed, count=32), torch.Generator().manual_seed(seed + 77)
    start = torch.Generator().manual_seed(seed)
    made = layer(TopK(WIDTH, _EXPERTS, top_k=_K, generator=start), seed=seed)
    torch.manual_seed(seed)
    beside = nn.Linear(WIDTH, OUT)
    adam = torch.optim.Adam([*made.parameters(), *beside.parameters()], lr=3e-3)
    cosine = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * t / _STEPS)))
    for _ in range(_STEPS):
        x_TD, y_TO = _batch(data, chance, _EACH)
        routed = [made(x_ND) for x_ND in x_TD.split(_EACH)]
        chosen_E = sum(one.routing.load_E for one in routed)
        share = Whole(chosen_E, torch.tensor(_EACH)) if whole else None  # pyrefly: ignore[bad-argument-type]
        made_TO = torch.cat([one.output for one in routed])[:, :OUT] + beside(x_TD)
        loss = (made_TO - y_TO).square().mean()
        if weight:
            loss = loss + weight * torch.stack([load_balance_loss(one.routing, whole=share) for one in routed]).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
    with torch.no_grad():
        x_TD, y_TO = _batch(data, torch.Generator().manual_seed(999), 512)
        routed_all = made.eval()(x_TD)
        left = (routed_all.output[:, :OUT] + beside(x_TD) - y_TO).square().sum()
        return float(left / (y_TO - y_TO.mean(0)).square().sum()), routed_all.routing


def _apart(routing: Routing) -> float:
    """The Jensen-Shannon divergence of the domains' loads, as a share of what it can be."""
    load_DE = (routing.dense() > 0).double().view(_DOMAINS, -1, _EXPERTS).sum(1)
    share_DE = load_DE / load_DE.sum(1, keepdim=True)

    def entropy(share: Tensor) -> Tensor:
        return -torch.xlogy(share, share).sum(-1)

    return float(entropy(share_DE.mean(0)) - entropy(share_DE).mean()) / math.log(_DOMAINS)
