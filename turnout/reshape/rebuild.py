"""A model of another configuration from the weights of one that exists, and the bill of both."""

import torch
from torch import Tensor

from turnout.models import LM, LMConfig
from turnout.models.checkpoint.own import empty, fill, refuse_adapters, stored

__all__ = ["bill", "rebuild"]


@torch.no_grad()
def rebuild(lm: LM, config: LMConfig, changed: dict[str, Tensor]) -> LM:
    """A new model: the tensors of ``changed``, and copies of the old model's for every other name.

    ``changed`` is empty afterwards: each tensor is let go when it has been copied, so that memory holds the old model
    and the new one, and not the new one twice.

    Args:
        lm: the model to take the rest from; it is left as it is.
        config: of the new model.
        changed: name -> tensor, those of banks in the order of ExpertWeights: up (E, D, H), down (E, F, D).
    """
    refuse_adapters(lm, "turnout.reshape")
    old = stored(lm)
    new = empty(config, lm.embedding.dtype)
    trained = {name: parameter.requires_grad for name, parameter in lm.named_parameters()}
    for name, parameter in new.named_parameters():
        parameter.data = parameter.data.to((changed if name in changed else old)[name].dtype)
        parameter.requires_grad_(trained.get(name, True))
    new.to(lm.embedding.device)
    for name, slot in stored(new).items():
        fill(slot, changed.pop(name) if name in changed else old[name], name)
    new.origin = lm.origin
    return new.train(lm.training)


def bill(before: LM, after: LM) -> dict[str, int | float]:
    """What both hold and use for a token."""
    old, new = before.cost(), after.cost()
    values: dict[str, int | float] = {}
    for name in ("params", "params_active", "flops"):
        values |= {f"{name}_before": getattr(old, name), f"{name}_after": getattr(new, name)}
    return values
