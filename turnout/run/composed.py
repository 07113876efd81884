"""Derivatives of hand-written gradients: by the composition of torch's own operations that the gradient is of."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["composes", "slopes", "transformed"]


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is on, of which gradients written by hand know nothing.

    >>> transformed(), torch.func.grad(lambda x: x * transformed())(torch.tensor(2.0))
    (False, tensor(1.))

    Source: none; two questions to torch.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def composes(slope: Tensor) -> bool:
    """Whether a backward pass must itself be differentiable (``create_graph=True``), or is of many slopes at once.

    Then it is taken through ``slopes``. torch's ``once_differentiable`` does not do: it raises only where the engine
    reaches its node, so ``torch.autograd.functional.hessian``, which asks for some inputs alone, gets zeros.
    """
    return torch.is_grad_enabled() or transformed() or torch._C._functorch.is_legacy_batchedtensor(slope)


def slopes(
    composition: Callable[..., Tensor], inputs: Sequence[Any], needed: Sequence[bool], slope: Tensor
) -> tuple[Tensor | None, ...]:
    """The gradients of ``composition(*inputs)`` where needed, with a graph: differentiable as often as one likes.

    Args:
        composition: the same function by operations that torch can differentiate.
        inputs: as it was called, with the graphs that they come from (``ctx.saved_tensors``).
        needed: for each input, whether its gradient is wanted (``ctx.needs_input_grad``).
        slope: the gradient of its result.

    Returns:
        For each input the gradient, or None.

    >>> x = torch.tensor(3.0, requires_grad=True)
    >>> (slope,) = slopes(lambda x: x**3, [x], [True], torch.tensor(1.0))
    >>> slope, torch.autograd.grad(slope, x)[0]
    (tensor(27., grad_fn=<MulBackward0>), tensor(18.))

    Source: none; a backward pass in a backward pass, as in torch.utils.checkpoint.
    """
    with torch.enable_grad(), torch.autocast(slope.device.type, enabled=False):
        # Views, so that a tensor that was passed twice has a gradient in each place.
        own = [one.view_as(one) if need else one for one, need in zip(inputs, needed, strict=True)]
        wanted = [one for one, need in zip(own, needed, strict=True) if need]
        result = composition(*own)
        if result.requires_grad:
            made = iter(torch.autograd.grad(result, wanted, slope, create_graph=True, materialize_grads=True))
        else:  # no entry: it depends on none of them
            made = iter([torch.zeros_like(one) for one in wanted])
    return tuple(next(made) if need else None for need in needed)
