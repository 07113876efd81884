"""The gradients of a block's parameters in one piece of memory, which is summed in the pieces of a schedule."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from turnout.errors import UsageError, word

__all__ = ["BlockGradients"]

_WHERE = "turnout.run.BlockPlayer"


class BlockGradients:
    """The gradients of some parameters of one block, and what a plan says of the pieces they are summed in.

    Args:
        parameters: of the block; those that ask for no gradient have none.
        sizes: bytes of each piece, in all those of the parameters that ask for a gradient; empty for no sum.
        what: for messages.

    Raises:
        UsageError: the pieces are not of this size, the parameters of several dtypes, or some in shards elsewhere.

    >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
    >>> gradients = BlockGradients([weight], (16, 8), "block 0")
    >>> gradients.of[weight].add_(1).sum().item(), gradients.piece(1).tolist()
    (6.0, [1.0, 1.0])

    Source: none; the buckets of every data-parallel engine.
    """

    def __init__(self, parameters: Sequence[Tensor], sizes: Sequence[int], what: str) -> None:
        self._trained = [each for each in dict.fromkeys(parameters) if each.requires_grad]
        if any(type(each) not in (Tensor, Parameter) for each in self._trained):
            kind = next(type(each).__name__ for each in self._trained if type(each) not in (Tensor, Parameter))
            allowed, fix = "be plain tensors, which no other engine holds a part of", "do not shard the model as well"
            raise UsageError(word(f"the parameters of {what}", got=kind, allowed=allowed, where=_WHERE, fix=fix))
        dtypes = sorted({str(each.dtype) for each in self._trained})
        if len(dtypes) > 1:
            fix = f"cast the model to {dtypes[0]}"
            allowed = "be one, so that gradients go over the wire together,"
            raise UsageError(word(f"the dtypes of {what}", got=dtypes, allowed=allowed, where=_WHERE, fix=fix))
        count = sum(each.numel() for each in self._trained)
        first = self._trained[0] if self._trained else torch.empty(0)
        self.flat = torch.zeros(count, dtype=first.dtype, device=first.device)
        if sizes and sum(sizes) != self.bytes:
            got = f"{len(sizes)} pieces of {sum(sizes)} bytes in all"
            allowed, fix = (
                f"be of the {self.bytes} bytes of {what}",
                "plan with costs that were profiled for this model",
            )
            raise UsageError(word("the pieces of the gradient", got=got, allowed=allowed, where=_WHERE, fix=fix))
        ends = torch.tensor([0, *sizes]).cumsum(0) // max(first.element_size(), 1)
        self._ends: list[int] = ends.tolist()
        self.of: dict[Tensor, Tensor] = {}
        at = 0
        for each in self._trained:
            self.of[each] = _like(each, self.flat[at : at + each.numel()])
            at += each.numel()

    @property
    def bytes(self) -> int:
        """How many there are to sum."""
        return self.flat.numel() * self.flat.element_size()

    def piece(self, index: int) -> Tensor:
        """A piece of all of them, to be summed in place."""
        return self.flat[self._ends[index] : self._ends[index + 1]]

    def give(self) -> None:
        """Adds each to its parameter's ``grad``."""
        for each, gradient in self.of.items():
            each.grad = gradient if each.grad is None else each.grad.add_(gradient)


def _like(parameter: Tensor, part: Tensor) -> Tensor:
    """The part in the parameter's shape, and in its order in memory where it has one: so optimizers run along both."""
    order = sorted(range(parameter.ndim), key=lambda axis: (-parameter.stride(axis), -parameter.shape[axis]))
    made = part.view([parameter.shape[axis] for axis in order])
    return made.permute([order.index(axis) for axis in range(parameter.ndim)])
