"""What the training loop moves in a router after each step: the correction bias, in fp32 whatever the router is."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.types.called import Called

__all__ = ["Corrected", "in_fp32", "nudge", "refuse_evaluation"]


def nudge(bias_E: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The bias after one step of balancing: b + rate * sign(mean load - load), exact for whole-number loads.

    Args:
        bias_E: (E,) the bias that the step was routed with.
        load_E: (E,) the tokens that each expert was chosen by in the whole step, before capacity.
        rate: how far each bias moves.

    Raises:
        ShapeError: load_E is not (E,).

    >>> nudge(torch.zeros(3), torch.tensor([5, 0, 1]), 0.5)
    tensor([-0.5000,  0.5000,  0.5000])

    Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1.
    """
    if load_E.shape != bias_E.shape:
        raise ShapeError(
            word(
                "load_E",
                got=f"shape {tuple(load_E.shape)}",
                allowed=f"have one load for each of the {bias_E.numel()} experts",
                where="after_step",
                fix="pass the sum of routing.load_E over the step's batches",
            )
        )
    load_E = load_E.detach().to(bias_E.device)
    return bias_E + rate * torch.sign(load_E.sum() - load_E.numel() * load_E).to(bias_E.dtype)


def refuse_evaluation(training: bool) -> None:
    """Refuses to balance a router in evaluation mode, where the load of held-out text must not leak in."""
    if not training:
        raise UsageError(
            word(
                "the router",
                got="one in evaluation mode",
                allowed="be in training mode",
                where="after_step",
                fix="call after_step from the training loop only, once per optimizer step",
            )
        )


def in_fp32(before: Tensor, after: Tensor) -> Tensor:
    """A number after its module moved between devices and dtypes: on the new device, with all its digits."""
    if after.dtype == torch.float32:
        return after
    return after.float() if before.is_meta else before.to(after.device)


class Corrected(Called):
    """A router that adds a bias to the scores it chooses by; what ``LossFree`` and ``GroupLimited`` have in common.

    ``bias_E`` is a buffer that the router registers under this name, so that it stands in checkpoints beside the gate;
    None for a router without. It stays in fp32 when the module is cast down, or steps of 0.001 would vanish.
    """

    bias_E: Tensor | None
    rate: float

    def after_step(self, load_E: Tensor) -> None:
        """Moves the bias, if there is one, by one step; the training loop calls it once per optimizer step.

        Args:
            load_E: (E,) the tokens that chose each expert (before capacity), summed over the step's batches and ranks.

        Raises:
            ShapeError: load_E is not (E,).
            UsageError: the router is in evaluation mode.
        """
        refuse_evaluation(self.training)
        if self.bias_E is not None:
            self.bias_E.copy_(nudge(self.bias_E, load_E, self.rate))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before_E = self.bias_E
        super()._apply(fn, recurse)
        if before_E is not None and self.bias_E is not None:
            self.bias_E = in_fp32(before_E, self.bias_E)
        return self
