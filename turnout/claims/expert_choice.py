"""Claim: experts that choose their tokens have an even load and learn more than tokens that choose; they leak."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.digits import CLASSES, LOOKS, SIDE, digits
from turnout.decide.token import ExpertChoice, TopK
from turnout.layers import MoE
from turnout.train.balance import load_balance_loss
from turnout.types import Routing

_WIDTH, _HIDDEN, _EXPERTS, _TOP_K = 32, 16, 8, 2
_STEPS, _BATCH, _RATE, _BALANCE = 400, 256, 3e-3, 0.01


def expert_choice() -> Claim:
    """Drawn digits are read with fewer errors when experts choose the images than when images choose, at equal FLOPs.

    The images of a batch are the tokens of one layer of experts. Both ways give every expert the same capacity, C =
    2 T / E; tokens that choose have the auxiliary loss, and drop what is over the capacity. The caveat is measured
    beside it: changing the last token changes which experts earlier ones get, which token choice without capacity never
    does, so expert choice is not for causal generation.

    >>> expert_choice().off
    'tokens choose, with the same capacity'

    Source: Zhou et al., 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2 and its limitations.
    """
    wrong, top = "share of wrong answers", "top-2 token choice, the same capacity"
    leak = "earlier tokens rerouted by a later one (share), token choice"
    return Claim(
        name="expert_choice",
        statement="Experts that choose their tokens have an exactly even load and learn more than tokens that choose "
        "with as much capacity; unlike those they leak the future.",
        source="Zhou et al., 2022, Expert Choice Routing",
        off="tokens choose, with the same capacity",
        switched={"even": "uneven", "experts choose": "tokens choose"},
        rows=(
            Row("MaxVio before training, exactly even", "within", "even", "uneven", "top-2 token choice", bound=0.0),
            Row(wrong, "below", "experts choose", "tokens choose", top),
            Row(leak, "within", "leak of tokens", "leak of experts", "expert choice", bound=0.0, headline=True),
        ),
        measure=_measure,
        seconds=8,
        note=f"drawn digits in {LOOKS} looks, one layer of {_EXPERTS} experts, capacity factor {_TOP_K}, {_STEPS} "
        f"steps of {_BATCH} images; MaxVio and leak of routers as initialised",
    )


def _measure(seed: int) -> Values:
    found = {"experts choose": _wrong(seed, experts=True), "tokens choose": _wrong(seed, experts=False)}
    generator = torch.Generator().manual_seed(seed)
    x_TD = torch.randn(512, _WIDTH, generator=generator)
    ours = ExpertChoice(_WIDTH, _EXPERTS, capacity_factor=float(_TOP_K), generator=generator)
    theirs = TopK(_WIDTH, _EXPERTS, top_k=_TOP_K, generator=generator)
    found |= {"even": _max_vio(ours(x_TD)), "uneven": _max_vio(theirs(x_TD))}
    leaks = {"leak of experts": _leaked(ours, x_TD, generator), "leak of tokens": _leaked(theirs, x_TD, generator)}
    return found | leaks


class _Reader(nn.Module):
    """One layer in, experts on a residual stream, one layer out."""

    def __init__(self, router: nn.Module, generator: torch.Generator) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(SIDE * SIDE, _WIDTH), nn.Linear(_WIDTH, CLASSES)
        self.norm = nn.LayerNorm(_WIDTH)
        self.experts = MoE(_WIDTH, _HIDDEN, _EXPERTS, router=router, std=_WIDTH**-0.5, generator=generator)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Routing]:
        h_BD = self.enter(x_BD)
        done = self.experts(self.norm(h_BD))
        return self.leave(h_BD + done.output), done.routing


def _wrong(seed: int, *, experts: bool) -> float:
    """The share of wrong answers on held-out images after training."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    choose = ExpertChoice if experts else TopK
    capacity = {"capacity_factor": float(_TOP_K)} if experts else {"capacity_factor": 1.0, "top_k": _TOP_K}
    net = _Reader(choose(_WIDTH, _EXPERTS, generator=generator, **capacity), generator)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(net.parameters(), lr=_RATE, weight_decay=0.0)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _RATE * (1 - step / _STEPS)
        x_BD, label_B = _images(generator)
        y_BC, routing = net(x_BD)
        loss = F.cross_entropy(y_BC, label_B)
        if not experts:
            loss = loss + _BALANCE * load_balance_loss(routing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    generator, errors = torch.Generator().manual_seed(10_000 + seed), []
    with torch.no_grad():
        for _ in range(16):
            x_BD, label_B = _images(generator)
            errors.append(float((net.eval()(x_BD)[0].argmax(1) != label_B).float().mean()))
    return math.fsum(errors) / len(errors)


def _images(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    label_B = torch.randint(CLASSES, (_BATCH,), generator=generator)
    return digits(label_B, torch.randint(LOOKS, (_BATCH,), generator=generator), generator), label_B


def _max_vio(routing: Routing) -> float:
    load_E = routing.load_E.double()
    return float(load_E.max() / load_E.mean() - 1)


def _leaked(router: nn.Module, x_TD: Tensor, generator: torch.Generator) -> float:
    """The largest share of earlier tokens whose experts change when only the last token does, over 64 tries."""
    before_TE = router(x_TD).dense()[:-1] != 0
    worst = 0.0
    for _ in range(64):
        changed_TD = x_TD.clone()
        changed_TD[-1] = 4 * torch.randn(x_TD.shape[1], generator=generator)
        after_TE = router(changed_TD).dense()[:-1] != 0
        worst = max(worst, float((before_TE != after_TE).any(1).float().mean()))
    return worst
