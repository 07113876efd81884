"""What a sparse transformer block computes, cut where a schedule may cut it: the interface of its player."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from turnout.run.blocks.halves import Owed

__all__ = ["BlockParts", "Gated", "Graph"]


@dataclasses.dataclass(frozen=True, eq=False)
class Gated:
    """What a gate says of T tokens: where their rows go, and what the combine will want to know.

    Args:
        x_TD: what the experts read; differentiable.
        weight_R: the combine weight of every entry, token by token; differentiable.
        expert_R: (R,) int64, the expert of every entry.
        start_T: (T + 1,) int64, where each token's entries begin.
        kept: (T, ...) tensors that ``combine`` gets beside the experts' sum; differentiable.
        aside: what the loss may want to know of the decision, such as scores to balance; differentiable.

    Source: none; plain bookkeeping.
    """

    x_TD: Tensor
    weight_R: Tensor
    expert_R: Tensor
    start_T: Tensor
    kept: tuple[Tensor, ...]
    aside: tuple[Tensor, ...] = ()


class BlockParts(Protocol):
    """One block on one rank. Every method is differentiable, by torch, in its tensors and in the parameters.

    ``rows`` are the sequences of the batch that x is of, for whatever else ``about`` says of them.
    """

    num_experts: int  # of all ranks

    @property
    def dense(self) -> Sequence[Tensor]:
        """The parameters that every rank has: attention's, the gate's, the norms'."""
        ...

    @property
    def expert(self) -> Sequence[Tensor]:
        """The parameters of this rank's experts."""
        ...

    def attention(self, x_BSD: Tensor, about: Any, rows: slice) -> Tensor:
        """The sequences after attention."""
        ...

    def gate(self, x_BSD: Tensor, about: Any, rows: slice) -> Gated:
        """Where each of the B x S tokens goes."""
        ...

    def experts(self, row_ND: Tensor, load: Sequence[int], linear: Callable[..., Tensor]) -> Tensor:
        """What this rank's experts make of rows sorted by expert, of which expert e has ``load[e]``."""
        ...

    def combine(self, sum_TD: Tensor, *kept: Tensor) -> Tensor:
        """The block's output for these tokens, from the weighted sum of what the experts made."""
        ...


class Graph:
    """A piece of the forward pass with a graph of its own: it ends at its inputs, and its backward pass is called.

    Args:
        work: called with the inputs and the ``Owed`` of this graph; gives the outputs.
        inputs: tensors of another graph, or of none.

    Source: none; plain bookkeeping.
    """

    def __init__(self, work: Callable[..., Sequence[Tensor]], *inputs: Tensor) -> None:
        self.owed = Owed()
        self._inputs = tuple(each.detach().requires_grad_(each.is_floating_point()) for each in inputs)
        with torch.enable_grad(), self.owed.deferring():
            self._outputs = tuple(work(self.owed, *self._inputs))

    @property
    def outputs(self) -> tuple[Tensor, ...]:
        """What the work gave, outside the graph."""
        return tuple(each.detach() for each in self._outputs)

    def back(self, slopes: Sequence[Tensor | None], gradient: Mapping[Tensor, Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the inputs; those of parameters are added to ``gradient``, or owed. Once."""
        known = [(o, s) for o, s in zip(self._outputs, slopes, strict=True) if s is not None and o.requires_grad]
        inputs = [each for each in self._inputs if each.requires_grad]
        outputs, slopes = [o for o, _ in known], [s for _, s in known]
        found = torch.autograd.grad(outputs, [*inputs, *gradient], slopes, allow_unused=True) if known else ()
        self._outputs = ()
        for parameter, slope in zip(gradient, found[len(inputs) :], strict=False):
            if slope is not None:
                gradient[parameter].add_(slope)
        given = dict(zip(map(id, inputs), found, strict=False))
        return tuple(_or_zeros(given.get(id(each)), each) for each in self._inputs)


def _or_zeros(slope: Tensor | None, of: Tensor) -> Tensor:
    return torch.zeros_like(of) if slope is None else slope
