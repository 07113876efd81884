"""Activations and their gradients into memory that is given, for executors that manage their own."""

import torch
from torch import Tensor

__all__ = ["activate_into", "activation_gradient"]

_aten = torch.ops.aten

# A row of fewer columns than this is copied to contiguous memory first: the loops of torch over strided rows spend more
# on each row than the copy costs.
_SHORT = 384


def _apply(kind: str, x: Tensor, out: Tensor) -> None:
    if kind in ("swiglu", "silu"):
        _aten.silu.out(x, out=out)
    elif kind in ("geglu", "gelu"):
        _aten.gelu.out(x, out=out)
    else:
        torch.clamp_min(x, 0, out=out)


def _gradient(kind: str, grad: Tensor, x: Tensor, out: Tensor) -> None:
    if kind in ("swiglu", "silu"):
        _aten.silu_backward.grad_input(grad, x, grad_input=out)
    elif kind in ("geglu", "gelu"):
        _aten.gelu_backward.grad_input(grad, x, grad_input=out)
    else:
        _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def activate_into(hidden_NH: Tensor, kind: str, out_NF: Tensor) -> None:
    """Writes the activation of ``hidden_NH`` to ``out_NF``, as ``turnout.run.activate`` computes it."""
    if not kind.endswith("glu"):
        _apply(kind, hidden_NH, out_NF)
        return
    F = out_NF.shape[1]
    gate, value = hidden_NH[:, :F], hidden_NH[:, F:]
    if F < _SHORT:
        out_NF.copy_(gate)
        gate = out_NF
    _apply(kind, gate, out_NF)
    out_NF.mul_(value)


def activation_gradient(
    kind: str,
    hidden_NH: Tensor,
    grad_NF: Tensor,
    weight_N1: Tensor,
    out_NF: Tensor,
    grad_NH: Tensor,
    grad_weight_N: Tensor | None,
    spare: list[Tensor],
) -> None:
    """The backward pass of weight * activation(hidden), which it recomputes.

    Args:
        kind: the activation.
        hidden_NH: what the activation was taken of.
        grad_NF: gradient of weight * activation(hidden); overwritten.
        weight_N1: the weights.
        out_NF: receives weight * activation(hidden).
        grad_NH: receives the gradient of ``hidden_NH``.
        grad_weight_N: receives the gradient of the weights, or None.
        spare: three tensors like ``grad_NF``, overwritten.
    """
    scratch, gate_copy, value_copy = spare
    gated = kind.endswith("glu")
    F = grad_NF.shape[1]
    gate, grad_gate = hidden_NH[:, :F], grad_NH[:, :F]
    short = gated and F < _SHORT
    if short:
        gate = gate_copy.copy_(gate)
    _apply(kind, gate, out_NF)
    if not gated:
        if grad_weight_N is not None:
            torch.sum(torch.mul(grad_NF, out_NF, out=scratch), 1, dtype=grad_weight_N.dtype, out=grad_weight_N)
        out_NF.mul_(weight_N1)
        _gradient(kind, grad_NF.mul_(weight_N1), gate, grad_NH)
        return
    value, grad_value = hidden_NH[:, F:], grad_NH[:, F:]
    through = torch.mul(grad_NF, out_NF, out=scratch)
    torch.mul(through, weight_N1, out=grad_value)
    if short:
        value = value_copy.copy_(value)
    if grad_weight_N is not None:
        torch.sum(through.mul_(value), 1, dtype=grad_weight_N.dtype, out=grad_weight_N)
    weighted = torch.mul(value, weight_N1, out=scratch)
    out_NF.mul_(weighted)
    grad_NF.mul_(weighted)
    if short:
        _gradient(kind, grad_NF, gate, grad_NF)
        grad_gate.copy_(grad_NF)
    else:
        _gradient(kind, grad_NF, gate, grad_gate)
