"""Claim: experts chosen by how strongly they answer fit data made that way better than a learned router's choice."""

import math

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.token import CompeteSMoE
from turnout.layers import MoE
from turnout.paths import every

_WIDTH, _EXPERTS, _HIDDEN, _K, _STEPS = 8, 8, 8, 2, 1000


def compete() -> Claim:
    """Held-out error of a competition, of a learned router, and of CompeteSMoE, which is tested with its router.

    >>> compete().off
    'the router alone'

    Source: Pham et al., 2024, "CompeteSMoE: Effective Training of Sparse Mixture of Experts via Competition", table 1.
    """
    error = "held-out error / variance"
    return Claim(
        name="compete",
        statement="Experts that win by the length of their outputs learn data made by such a competition better than "
        "under a learned router; the router that learns from them does not follow at this length.",
        source="Pham et al., 2024, CompeteSMoE",
        off="the router alone",
        switched={"competition": "router"},
        rows=(
            Row(error, "below", "competition", "router", "the router alone"),
            Row(error, "below", "scheduled", "router", "the router alone, both tested with the router", headline=True),
        ),
        measure=_measure,
        seconds=25,
        note=f"data of a competition of {_EXPERTS} experts in {_WIDTH} dimensions, top {_K}, {_STEPS} steps of 256",
    )


def _measure(seed: int) -> Values:
    return {
        "competition": _run(seed, 1.0, compete=True),
        "router": _run(seed, 0.0),
        "scheduled": _run(seed, None),
    }


def _made(share: float | None, seed: int) -> MoE:
    start = torch.Generator().manual_seed(seed)
    router = CompeteSMoE(_WIDTH, _EXPERTS, top_k=_K, share=share, distil=8.0, std=0.2, generator=start)
    return MoE(_WIDTH, _HIDDEN, _EXPERTS, router=router, activation="relu", bias=True, std=0.35, generator=start)


@torch.no_grad()
def _competed(layer: MoE, x_TD: Tensor) -> Tensor:
    """What a competition gives, whatever the router says."""
    y_TED = every(layer.bank, x_TD)
    best_TK, index_TK = y_TED.norm(dim=2).topk(_K, dim=1)
    chosen_TKD = y_TED.gather(1, index_TK[..., None].expand(-1, -1, y_TED.shape[2]))
    return (best_TK.softmax(1)[..., None] * chosen_TKD).sum(1)


def _run(seed: int, share: float | None, *, compete: bool = False) -> float:
    teacher, layer = _made(1.0, 500 + seed), _made(share, seed)
    with torch.no_grad():
        for name, parameter in teacher.bank.named_parameters():
            parameter.mul_(1.0 if "bias" in name else 2.0)
    chance, draws = torch.Generator().manual_seed(seed + 5), torch.Generator().manual_seed(seed)
    adam = torch.optim.Adam(layer.parameters(), lr=5e-3)
    cosine = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 0.05 + 0.475 * (1 + math.cos(math.pi * t / _STEPS)))
    layer.train()
    for _ in range(_STEPS):
        x_TD = torch.randn(256, _WIDTH, generator=chance)
        y_TD = _competed(teacher, x_TD) + 0.05 * torch.randn(256, _WIDTH, generator=chance)
        routed = layer(x_TD, generator=draws)
        asked = 0 if routed.routing.penalty is None else routed.routing.penalty
        adam.zero_grad()
        ((routed.output - y_TD).square().mean() + asked).backward()
        adam.step()
        cosine.step()
        router = layer.router
        assert isinstance(router, CompeteSMoE)
        router.after_step(routed.routing.load_E)
    x_TD = torch.randn(4096, _WIDTH, generator=torch.Generator().manual_seed(9))
    y_TD = _competed(teacher, x_TD)
    with torch.no_grad():
        made_TD = _competed(layer, x_TD) if compete else layer.eval()(x_TD).output
        return float((made_TD - y_TD).square().sum() / (y_TD - y_TD.mean(0)).square().sum())
