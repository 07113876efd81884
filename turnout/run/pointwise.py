"""Activations and their gradients into memory that is given, for executors that manage their own.

By one pass over memory where kernels can be compiled (``turnout.run.compiled.gates``), else by calls of torch.
"""

import torch
from torch import Tensor

from turnout.run.compiled.gates import activated, activation_slopes, suits_gates
from turnout.types.weights import GATED, OAI_LIMIT, OAI_SLOPE

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
    elif kind in ("geglu_tanh", "gelu_tanh"):
        _aten.gelu.out(x, approximate="tanh", out=out)
    else:
        torch.clamp_min(x, 0, out=out)


def _gradient(kind: str, grad: Tensor, x: Tensor, out: Tensor) -> None:
    if kind in ("swiglu", "silu"):
        _aten.silu_backward.grad_input(grad, x, grad_input=out)
    elif kind in ("geglu", "gelu"):
        _aten.gelu_backward.grad_input(grad, x, grad_input=out)
    elif kind in ("geglu_tanh", "gelu_tanh"):
        _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=out)
    else:
        _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out)


def _parts(hidden_NH: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """Gate and value, (N, F) each."""
    F = hidden_NH.shape[1] // 2
    return (hidden_NH[:, 0::2], hidden_NH[:, 1::2]) if interleaved else (hidden_NH[:, :F], hidden_NH[:, F:])


def activate_into(hidden_NH: Tensor, kind: str, out_NF: Tensor, *, interleaved: bool = False) -> None:
    """Writes the activation of ``hidden_NH`` to ``out_NF``, as ``turnout.run.activate`` computes it."""
    if suits_gates(kind, hidden_NH, out_NF):
        activated(hidden_NH, kind, out_NF, interleaved=interleaved)
        return
    if kind not in GATED:
        _apply(kind, hidden_NH, out_NF)
        return
    gate, value = _parts(hidden_NH, interleaved)
    if kind == "swiglu_oai":
        # g * sigmoid(a g) = silu(a g) / a.
        _aten.silu.out(torch.clamp_max(gate, OAI_LIMIT, out=out_NF).mul_(OAI_SLOPE), out=out_NF)
        out_NF.mul_(1 / OAI_SLOPE).mul_(value.clamp(-OAI_LIMIT, OAI_LIMIT).add_(1))
        return
    if interleaved or out_NF.shape[1] < _SHORT:
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
    *,
    interleaved: bool = False,
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
        interleaved: whether gate and value alternate.
    """
    if suits_gates(kind, hidden_NH, grad_NF, out_NF, grad_NH, grad_weight_N):
        given = hidden_NH, grad_NF, weight_N1[:, 0], out_NF, grad_NH, grad_weight_N
        return activation_slopes(kind, *given, interleaved=interleaved)
    scratch, gate_copy, value_copy = spare
    if kind not in GATED:
        return _plain_gradient(kind, hidden_NH, grad_NF, weight_N1, out_NF, grad_NH, grad_weight_N, scratch)
    gate, value = _parts(hidden_NH, interleaved)
    grad_gate, grad_value = _parts(grad_NH, interleaved)
    if kind == "swiglu_oai":
        given = grad_NF, weight_N1, out_NF, grad_gate, grad_value, grad_weight_N, spare
        return _clamped_gradient(gate, value, *given)
    short = interleaved or grad_NF.shape[1] < _SHORT
    if short:
        gate = gate_copy.copy_(gate)
    _apply(kind, gate, out_NF)
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
    return None


def _plain_gradient(
    kind: str,
    hidden_NF: Tensor,
    grad_NF: Tensor,
    weight_N1: Tensor,
    out_NF: Tensor,
    grad_hidden_NF: Tensor,
    grad_weight_N: Tensor | None,
    scratch_NF: Tensor,
) -> None:
    """``activation_gradient`` of an activation without a gate."""
    _apply(kind, hidden_NF, out_NF)
    if grad_weight_N is not None:
        torch.sum(torch.mul(grad_NF, out_NF, out=scratch_NF), 1, dtype=grad_weight_N.dtype, out=grad_weight_N)
    out_NF.mul_(weight_N1)
    _gradient(kind, grad_NF.mul_(weight_N1), hidden_NF, grad_hidden_NF)


def _clamped_gradient(
    gate: Tensor,
    value: Tensor,
    grad_NF: Tensor,
    weight_N1: Tensor,
    out_NF: Tensor,
    grad_gate: Tensor,
    grad_value: Tensor,
    grad_weight_N: Tensor | None,
    spare: list[Tensor],
) -> None:
    """``activation_gradient`` of "swiglu_oai": nothing flows where a clamp holds, as in torch.clamp at its bounds."""
    scratch, steep, raised = spare
    torch.clamp_max(gate, OAI_LIMIT, out=steep).mul_(OAI_SLOPE)
    _aten.silu.out(steep, out=out_NF)
    through = torch.mul(grad_NF, out_NF.mul_(1 / OAI_SLOPE), out=scratch)
    torch.clamp(value, -OAI_LIMIT, OAI_LIMIT, out=raised)
    torch.mul(through, weight_N1, out=grad_value).masked_fill_(raised.ne(value), 0)
    raised.add_(1)
    if grad_weight_N is not None:
        torch.sum(through.mul_(raised), 1, dtype=grad_weight_N.dtype, out=grad_weight_N)
    weighted = torch.mul(raised, weight_N1, out=scratch)
    out_NF.mul_(weighted)
    # The slope of g * sigmoid(a g) at g is that of silu at a g.
    _aten.silu_backward.grad_input(grad_NF.mul_(weighted), steep, grad_input=grad_NF)
    grad_gate.copy_(grad_NF.masked_fill_(gate.le(OAI_LIMIT).logical_not_(), 0))
