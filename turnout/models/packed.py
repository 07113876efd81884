"""What must not be done to a model whose maps are in few bits is refused here, by name."""

from torch import nn

from turnout.errors import UsageError, word
from turnout.paths import OffloadedBank, PackedWeight

__all__ = ["refuse_packed"]


def refuse_packed(model: nn.Module, what: str, *, where: str) -> None:
    """Refuses a model with weights in few bits where they would be passed over, or cannot be changed.

    Args:
        model: any.
        what: what was to be done, to follow "to be": "trained".
        where: the function.

    Raises:
        UsageError: it has such weights, and the first is named; or experts that are in files.

    >>> refuse_packed(nn.Linear(2, 2), "trained", where="turnout.train")

    Source: none; plain bookkeeping.
    """
    for module in model.modules():
        if isinstance(module, OffloadedBank):
            raise module.refusal(what)
    first = next((name for name, module in model.named_modules() if isinstance(module, PackedWeight)), None)
    if first is not None:
        got = f"one with {first} in few bits"
        fix = "do it before turnout.reshape.quantize, or write the weights out with turnout.reshape.densify"
        raise UsageError(word("the model", got=got, allowed=f"have whole weights to be {what}", where=where, fix=fix))
