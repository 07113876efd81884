"""A small regression that experts can share out: each cluster of inputs has a function of its own."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from turnout.layers import MoE
from turnout.train.balance import demand, load_balance_loss
from turnout.types import Routing
from turnout.wrappers import takes

__all__ = ["OUT", "WIDTH", "Clusters", "Fitted", "fitted", "layer", "max_vio"]

WIDTH = 32
OUT = 16
_TEST = 4096


class Clusters:
    """Gaussian clusters in 32 dimensions, each with a two-layer network of what is left of x without the centre.

    Args:
        seed: of the centres and functions.
        count: C, how many clusters.
        skew: cluster c, counted from 1, is c^-skew as frequent as the first.
        inside: how many directions all functions look at, the same for all; None for all directions.
    """

    def __init__(self, seed: int, *, count: int = 16, skew: float = 0.0, inside: int | None = None) -> None:
        chance = torch.Generator().manual_seed(1000 + seed)
        self.centre_CD = torch.randn(count, WIDTH, generator=chance)
        up_CDH = torch.randn(count, WIDTH, 16, generator=chance) * 1.5 / math.sqrt(WIDTH)
        self.down_CHO = torch.randn(count, 16, OUT, generator=chance) * 1.5 / 4
        if inside is not None:
            axis_Dm = torch.linalg.qr(torch.randn(WIDTH, inside, generator=chance))[0]
            up_CDH = torch.einsum("dm,em,ceh->cdh", axis_Dm, axis_Dm, up_CDH) * math.sqrt(WIDTH / inside)
        self.up_CDH = up_CDH
        share_C = torch.arange(1, count + 1).float() ** -skew
        self.share_C = share_C / share_C.sum()

    def draw(self, tokens: int, chance: torch.Generator, cluster_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(T, D) inputs and (T, O) targets."""
        if cluster_T is None:
            cluster_T = torch.multinomial(self.share_C, tokens, True, generator=chance)
        left_TD = torch.randn(len(cluster_T), WIDTH, generator=chance)
        hidden_TH = torch.einsum("td,tdh->th", left_TD, self.up_CDH[cluster_T]).tanh()
        return self.centre_CD[cluster_T] + left_TD, torch.einsum("th,tho->to", hidden_TH, self.down_CHO[cluster_T])


@dataclasses.dataclass(frozen=True)
class Fitted:
    """What a run came to.

    Args:
        fvu: held-out squared error over the variance of the target.
        routing: of the held-out inputs.
        layer: trained.
        trained: the routings of the last steps, without gradients.
    """

    fvu: float
    routing: Routing
    layer: MoE
    trained: tuple[Routing, ...]


def fitted(
    layer: MoE,
    data: Any,
    *,
    seed: int,
    steps: int = 500,
    batch: int = 256,
    lr: float = 3e-3,
    aux: float = 0.0,
    skip: bool = True,
    look: Callable[[int, MoE], None] | None = None,
    keep: int = 0,
) -> Fitted:
    """Trains a layer, and a linear map beside it, by Adam on fresh inputs, as the loop does: penalty, ``after_step``.

    Args:
        layer: of width 32; its first 16 outputs are what is asked for.
        data: what it learns: ``draw`` and ``centre_CD`` as of ``Clusters``.
        seed: of the inputs.
        steps: how many.
        batch: inputs a step.
        lr: at the beginning; a cosine takes it to a tenth.
        aux: weight of the load-balance loss.
        skip: whether the linear map is there.
        look: called after each step.
        keep: the routings of how many last steps are kept.
    """
    chance, noise = torch.Generator().manual_seed(seed + 77), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    beside = nn.Linear(WIDTH, OUT)
    if not skip:
        nn.init.zeros_(beside.weight)
        nn.init.zeros_(beside.bias)
    trained = [*layer.parameters(), *(beside.parameters() if skip else ())]
    adam = torch.optim.Adam([p for p in trained if p.requires_grad], lr=lr)
    cosine = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * t / steps)))
    kept = []
    layer.train()
    for step in range(steps):
        x_TD, y_TO = data.draw(batch, chance)
        routed = layer(x_TD, token_id=_ids(x_TD, data), generator=noise)
        loss = (routed.output[:, :OUT] + beside(x_TD) - y_TO).square().mean() + _asked(routed.routing, aux)
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
        if hasattr(layer.router, "after_step"):
            learn: Any = layer.router.after_step  # pyrefly: ignore[missing-attribute]
            learn(demand(routed.routing), **({"num_tokens": len(x_TD)} if takes(learn, "num_tokens") else {}))
        if step >= steps - keep:
            kept.append(routed.routing.detach())
        if look is not None:
            look(step, layer)
    return _tested(layer, beside, data, tuple(kept))


def _asked(routing: Routing, aux: float) -> Tensor | float:
    """What is minimised beside the error."""
    asked: Tensor | float = aux * load_balance_loss(routing) if aux else 0.0
    return asked if routing.penalty is None else asked + routing.penalty


@torch.no_grad()
def _tested(layer: MoE, beside: nn.Module, data: Any, kept: tuple[Routing, ...]) -> Fitted:
    x_TD, y_TO = data.draw(_TEST, torch.Generator().manual_seed(9))
    routed = layer.eval()(x_TD, token_id=_ids(x_TD, data))
    left = (routed.output[:, :OUT] + beside(x_TD) - y_TO).square().sum()
    return Fitted(float(left / (y_TO - y_TO.mean(0)).square().sum()), routed.routing, layer, kept)


def _ids(x_TD: Tensor, data: Any) -> Tensor:
    """(T,) which centre is the nearest: what stands for a token's id."""
    return torch.cdist(x_TD, data.centre_CD).argmin(1)


def max_vio(routing: Routing) -> float:
    """How much more than its share the busiest expert has, over its share."""
    load_E = routing.load_E.double()
    return float(load_E.max() / load_E.mean() - 1)


def layer(router: nn.Module, *, hidden: int = 24, seed: int = 0, **options: Any) -> MoE:
    """A layer of ReLU experts with biases under this router."""
    count = int(router.num_experts) - sum((options.get("zero_computation") or {}).values())  # pyrefly: ignore[bad-argument-type]
    start: dict[str, Any] = {
        "activation": "relu",
        "bias": True,
        "std": 0.18,
        "generator": torch.Generator().manual_seed(seed),
    }
    return MoE(WIDTH, hidden, count, router=router, **(start | options))
