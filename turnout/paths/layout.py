"""Fused optimizers, and states of theirs that turnout 0.1 saved: banks had memory of another order then."""

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

__all__ = ["align_fused_optimizers"]


@functools.cache
def align_fused_optimizers() -> None:
    """From now on gradients and states of fused optimizers lie as their parameter does, before each of their steps.

    On a CPU they go through the memory of parameter, gradient and states side by side, whatever the strides say. What
    autograd and the optimizer make lies as the parameter. A state that 0.1 wrote with ``torch.save``, which keeps
    strides, does not: then every number met another's. Weights came out as far off as 57 % with AdamW and 96 % with
    SGD. Only such tensors are copied, to the same values in another order.

    Source: none; a hook that torch has for all optimizers.
    """
    register_optimizer_step_pre_hook(_align)


@torch.no_grad()
def _align(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        for parameter in group["params"]:
            strides = parameter.stride()
            if parameter.grad is not None and _lies_otherwise(parameter.grad, parameter, strides):
                parameter.grad = torch.empty_like(parameter, dtype=parameter.grad.dtype).copy_(parameter.grad)
            state = optimizer.state.get(parameter, {})
            for name, value in state.items():
                if isinstance(value, Tensor) and _lies_otherwise(value, parameter, strides):
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _lies_otherwise(value: Tensor, parameter: Tensor, strides: tuple[int, ...]) -> bool:
    return value.layout == torch.strided and value.shape == parameter.shape and value.stride() != strides
