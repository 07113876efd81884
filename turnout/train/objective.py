"""What a micro-batch's training minimises: its share of the token loss, and its balance losses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.train.balance import Whole, demand, load_balance_loss, router_z_loss
from turnout.train.team import Passed, Weights
from turnout.types import Routing

__all__ = ["objective"]


def objective(
    nats: Tensor, routings: Sequence[Routing], wholes: Sequence[Whole | None], weights: Weights, *, tokens: int = 1
) -> tuple[Tensor, Passed]:
    """The loss to differentiate, and what is told of it.

    Args:
        nats: this process's rows' part of the step's mean token loss.
        routings: of its rows, all layers.
        wholes: of each layer what ``load_balance_loss`` and ``router_z_loss`` take as ``whole``.
        weights: of the losses.
        tokens: how many of this process's tokens are no padding: a router's penalty, a mean over them, is weighed by
            their share of the step's, so that what is minimised is the mean over the step.

    >>> loss, told = objective(torch.ones(()), [], [], Weights(0.01, 0.0, predicted=8, accumulate=1))
    >>> loss.item(), told.losses_4.tolist()
    (1.0, [1.0, 0.0, 0.0, 0.0])

    Source: Fedus et al., 2021, "Switch Transformers", and Zoph et al., 2022, "ST-MoE", for the balance losses.
    """
    balanced = wholes
    if weights.chosen_L is not None:
        # As large a part of the step's tokens as others, whatever their number: the parts add up to the step's loss.
        part = nats.new_tensor(weights.tokens / weights.accumulate)
        balanced = [Whole(chosen_E, part) for chosen_E in weights.chosen_L]
    scored = [(r, w) for r, w in zip(routings, balanced, strict=True) if r.score_TE is not None]
    logged = [(r, w) for r, w in zip(routings, wholes, strict=True) if r.logit_TE is not None]
    asked = [r.penalty for r in routings if r.penalty is not None]
    loss, aux, z, penalty = nats, *(torch.zeros_like(nats) for _ in range(3))
    if scored:
        with torch.set_grad_enabled(weights.aux > 0):
            aux = torch.stack([load_balance_loss(r, whole=w) for r, w in scored]).mean() / weights.accumulate
    if logged:
        with torch.set_grad_enabled(weights.z > 0):
            z = torch.stack([router_z_loss(r, whole=w) for r, w in logged]).mean() / weights.accumulate
    if scored and weights.aux > 0:
        loss = loss + weights.aux * aux
    if logged and weights.z > 0:
        loss = loss + weights.z * z
    if asked:
        with torch.set_grad_enabled(weights.penalty > 0):
            penalty = torch.stack(asked).mean() * (tokens / max(1, weights.tokens))
        loss = loss + weights.penalty * penalty if weights.penalty > 0 else loss
    # The demand, before capacity took its share: that is what a router has to balance.
    wanted = [demand(r) if w is None else w.chosen_E for r, w in zip(routings, wholes, strict=True)]
    losses_4 = torch.stack([each.detach().to(nats.dtype) for each in (nats, aux, z, penalty)])
    return loss, Passed(losses_4, wanted, len(scored), len(logged))
