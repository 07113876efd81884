"""What of a model is trained, and what stays as it is."""

import contextlib
from collections.abc import Iterator

from torch import nn

from turnout.errors import UsageError, word
from turnout.models.packed import refuse_packed
from turnout.paths import LowRank
from turnout.wrappers import routers_of

__all__ = ["training"]


@contextlib.contextmanager
def training(model: nn.Module, only: str) -> Iterator[None]:
    """While this is open, only these parameters ask for gradients; then each asks as it did before.

    Args:
        model: any; "router" wants one that names its ``routers``, "adapters" one with ``LowRank`` maps.
        only: "all" changes nothing: what is frozen stays frozen.

    Raises:
        UsageError: nothing would be trained, or weights are in few bits.

    >>> model = nn.Linear(2, 2)
    >>> with training(model, "all"):
    ...     model.weight.requires_grad
    True

    Source: none; plain bookkeeping.
    """
    refuse_packed(model, "trained", where="turnout.train")
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    chosen = {parameter for parameter, asks in asked.items() if asks} if only == "all" else _chosen(model, only)
    if not chosen:
        got, fix = "a model without any", "train all of it, with only=all"
        if only == "all":
            got, fix = "a model whose every parameter is frozen", "call requires_grad_() on what is to be trained"
        elif only == "adapters":
            fix = "start from a model, with turnout train --from MODEL only=adapters"
        elif routers_of(model):
            got = "a model whose routers have nothing to learn"
        allowed = "be there to be trained"
        raise UsageError(word(f"parameters of {only}", got=got, allowed=allowed, where="turnout.train", fix=fix))
    try:
        for parameter in asked:
            parameter.requires_grad_(parameter in chosen)
        yield
    finally:
        for parameter, asks in asked.items():
            parameter.requires_grad_(asks)


def _chosen(model: nn.Module, only: str) -> set[nn.Parameter]:
    adapters = [module for module in model.modules() if isinstance(module, LowRank)]
    return {
        parameter
        for module in (routers_of(model) if only == "router" else adapters)
        for parameter in module.parameters()
    }
