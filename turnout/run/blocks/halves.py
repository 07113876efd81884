"""A backward pass in two halves: gradients of inputs at once, gradients of matrices when there is time for them."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from turnout.run.product import instead_of_linear, linear, product
from turnout.run.ranks.exchange import refuse_second

__all__ = ["Owed"]


@dataclasses.dataclass(frozen=True, eq=False)
class _Bill:
    """One product's weight gradient, not computed yet: slope^T x."""

    weight: Tensor
    bias: Tensor | None
    row: int | None
    x_MI: Tensor
    slope_MO: Tensor


class Owed:
    """The weight gradients that a backward pass has put off, and what is needed to compute them.

    Inside ``with owed.deferring()`` every ``turnout.run.product.linear`` by a parameter gives its input's gradient in
    the backward pass and puts its weight's on the bill; ``pay`` computes them, later and once.

    >>> weight, x, owed = torch.nn.Parameter(torch.ones(2, 3)), torch.ones(4, 3, requires_grad=True), Owed()
    >>> with owed.deferring():
    ...     y = linear(x, weight)
    >>> torch.autograd.grad(y.sum(), x)[0].shape, weight.grad, len(owed)
    (torch.Size([4, 3]), None, 1)
    >>> gradient = {weight: torch.zeros_like(weight)}
    >>> owed.pay(gradient)
    >>> gradient[weight].tolist()
    [[4.0, 4.0, 4.0], [4.0, 4.0, 4.0]]

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", whose B and W these are.
    """

    def __init__(self) -> None:
        self._bills: list[_Bill] = []

    def __len__(self) -> int:
        return len(self._bills)

    @contextlib.contextmanager
    def deferring(self) -> Iterator[None]:
        """Products by parameters put their weights' gradients off, in this thread."""
        with instead_of_linear(self.linear):
            yield

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, row: int | None = None) -> Tensor:
        """The affine map of ``turnout.run.product.linear``, its weight's gradient put off where that is a parameter.

        Args:
            x: (..., I).
            weight: (O, I), or (E, O, I) with ``row``.
            bias: (O,), or (E, O) with ``row``; None for none.
            row: which of E stacked maps to take.
        """
        leaf = weight.is_leaf and weight.requires_grad and (bias is None or (bias.is_leaf and bias.requires_grad))
        with instead_of_linear(None):
            if not leaf or not torch.is_grad_enabled():
                return linear(x, *_taken(weight, bias, row))
            x_MI = x.reshape(-1, x.shape[-1])
            # What has no gradient to give would have none to receive, and the bill would never be written.
            x_MI = x_MI if x_MI.requires_grad else x_MI.detach().requires_grad_()
            y_MO: Tensor = _PutOff.apply(x_MI, self, weight, bias, row)  # pyrefly: ignore[bad-assignment]
            return y_MO.view(*x.shape[:-1], weight.shape[-2])

    def write(self, bill: _Bill) -> None:
        """Puts one more on the bill."""
        self._bills.append(bill)

    @torch.no_grad()
    def pay(self, gradient: Mapping[Tensor, Tensor]) -> None:
        """Adds to each parameter's tensor what is owed to it, and owes nothing then.

        Args:
            gradient: a tensor of the parameter's shape, for every parameter that was multiplied by.
        """
        bills, self._bills = self._bills, []
        for bill in bills:
            if not len(bill.x_MI):
                continue
            to = gradient[bill.weight] if bill.row is None else gradient[bill.weight][bill.row]
            to.add_(product(bill.slope_MO.t(), bill.x_MI))
            if bill.bias is not None:
                to = gradient[bill.bias] if bill.row is None else gradient[bill.bias][bill.row]
                to.add_(bill.slope_MO.sum(0))


def _taken(weight: Tensor, bias: Tensor | None, row: int | None) -> tuple[Tensor, Tensor | None]:
    return (weight, bias) if row is None else (weight[row], None if bias is None else bias[row])


class _PutOff(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_MI: Tensor, owed: Owed, weight: Tensor, bias: Tensor | None, row: int | None) -> Tensor:
        weight_OI, bias_O = _taken(weight, bias, row)
        ctx.save_for_backward(x_MI)
        # Not saved as the input's are: it is the parameter itself, whose graph ends here.
        ctx.owed, ctx.of, ctx.weight_OI = owed, (weight, bias, row), weight_OI.detach()
        return linear(x_MI, weight_OI, bias_O)

    @staticmethod
    def backward(ctx, slope_MO: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        refuse_second(slope_MO)
        (x_MI,) = ctx.saved_tensors
        ctx.owed.write(_Bill(*ctx.of, x_MI=x_MI, slope_MO=slope_MO))
        return product(slope_MO, ctx.weight_OI), None, None, None, None
