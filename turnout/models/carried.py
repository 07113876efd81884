"""Models whose routers hand something from layer to layer."""

from torch import nn

from turnout.errors import UsageError, word

__all__ = ["refuse_carry"]


def refuse_carry(model: nn.Module, what: str, *, where: str) -> None:
    """Refuses a model with a router that is told what the one before it carried on, where nobody would hand it over.

    Args:
        model: any.
        what: what was to be done, to follow "to be": "cut into stages".
        where: the function.

    Raises:
        UsageError: it has such a router, and the first is named.

    >>> refuse_carry(nn.Linear(2, 2), "cut into stages", where="turnout.models.stages")

    Source: none; plain bookkeeping.
    """
    for name, module in model.named_modules():
        if getattr(module, "needs_carry", False):
            got, fix = f"one with {name} ({type(module).__name__})", "take a router that looks at its own layer: TopK"
            allowed = f"have routers that each look at one layer to be {what}"
            raise UsageError(word("the model", got=got, allowed=allowed, where=where, fix=fix))
