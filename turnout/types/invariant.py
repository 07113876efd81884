"""Batch invariance: within it, what a row gives does not depend, to the last bit, on which rows stand beside it."""

import contextlib
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from turnout.errors import UsageError, word

__all__ = ["alike", "batch_invariant", "invariant_here", "refuse_invariant"]

_HERE = threading.local()
# Numbers that vectors of any processor divide, a few at a time, and as many as torch gives to a single thread.
_WHOLE, _PART = 128, 1 << 14


@contextlib.contextmanager
def batch_invariant() -> Iterator[None]:
    """Within it a row's output has the same bits whoever shares its batch: other rows, how many, where, and padding.

    Products take their rows in tiles of one size, or by kernels whose rows do not know each other, and never by a
    kernel that is chosen by how many rows there are; attention reads each row's own positions alone. For inference, in
    this thread; gradients are off. What looks at the whole batch by its nature is refused by name: capacity limits,
    expert choice, and paths that have no such form. Code that ``torch.compile`` has compiled does not ask.

    Raises:
        UsageError: within it, what has no batch-invariant form, gradients, or autocast.

    >>> with batch_invariant():
    ...     invariant_here("the doctest")
    True

    Source: He, 2025, "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab), for the name and the aim.
    """
    before = getattr(_HERE, "on", False)
    _HERE.on = True
    try:
        with torch.no_grad():
            yield
    finally:
        _HERE.on = before


def invariant_here(where: str) -> bool:
    """Whether this thread is within ``batch_invariant``.

    Args:
        where: who asks, for errors.

    Raises:
        UsageError: it is, and gradients or autocast were turned on inside.

    >>> invariant_here("the doctest")
    False

    Source: none; plain bookkeeping.
    """
    if torch.compiler.is_compiling() or not getattr(_HERE, "on", False):
        return False
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        got = "gradients" if torch.is_grad_enabled() else "autocast"
        fix = "train outside of it" if got == "gradients" else "cast the model itself: model.to(torch.bfloat16)"
        raise UsageError(word("batch_invariant", got=got, allowed="be for inference", where=where, fix=fix))
    return True


def alike(function: Callable[[Tensor], Tensor], x: Tensor, where: str) -> Tensor:
    """The element-wise function of x, within ``batch_invariant`` of each number by the same instructions.

    torch takes vectors of numbers and what is left at the end one by one, by another routine: of silu, sigmoid and
    softplus the last bit then depends on how many numbers there are. Here there is nothing left at the end.

    Args:
        function: of tensors of any shape, one number for each.
        x: of any shape.
        where: who asks, for errors.

    >>> alike(torch.sigmoid, torch.zeros(3), "the doctest")
    tensor([0.5000, 0.5000, 0.5000])

    Source: none; padding.
    """
    if not invariant_here(where) or x.device.type != "cpu":
        return function(x)
    count = x.numel()
    if count % _WHOLE:
        flat = x.new_zeros(-(-count // _WHOLE) * _WHOLE)
        flat[:count] = x.reshape(-1)
    else:
        flat = x.reshape(-1).contiguous()  # every second number, say, would be taken one by one
    if torch.get_num_threads() > 1 and len(flat) > _PART:
        return torch.cat([function(part) for part in flat.split(_PART)])[:count].view(x.shape)
    return function(flat)[:count].view(x.shape)


def refuse_invariant(what: str, where: str, fix: str) -> None:
    """Refuses, within ``batch_invariant``, what depends on the rows beside.

    Args:
        what: in words.
        where: who asks.
        fix: what to do instead.

    Raises:
        UsageError: this thread is within it.

    >>> refuse_invariant("a limit of capacity", "the doctest", "take it away")

    Source: none; plain bookkeeping.
    """
    if invariant_here(where):
        allowed = "depend on a row's own text alone"
        raise UsageError(word("batch_invariant", got=what, allowed=allowed, where=where, fix=fix))
