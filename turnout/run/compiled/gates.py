"""Activations and their gradients in one pass over memory, compiled: what ``turnout.run.pointwise`` takes many for."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.engine import array, compiled_here, kernel, takes
from turnout.run.compiled.lanes import prange, wide
from turnout.run.compiled.narrow import narrow
from turnout.run.compiled.pointwise import exponential
from turnout.types.weights import GATED, OAI_LIMIT, OAI_SLOPE

__all__ = ["GATES", "activate_rows", "activated", "activation_slopes", "slope_rows", "suits_gates"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ROWS = 16  # rows that one thread takes at a time


class _Gate(NamedTuple):
    """x sigmoid(a x + b x^3) or max(x, 0); x clamped to at most ``limit``, the value to within it, then ``plus``.

    With ``silu`` it is x sigmoid(x) and nothing else, which has a loop of its own, in two thirds of the time.
    """

    a: np.float32 = np.float32(0)
    b: np.float32 = np.float32(0)
    limit: np.float32 = np.float32(np.inf)
    plus: np.float32 = np.float32(0)
    relu: bool = False
    silu: bool = False


_SILU, _RELU = _Gate(np.float32(1), silu=True), _Gate(relu=True)
# (1 + tanh(u)) / 2 = sigmoid(2 u).
_ROOT = 2 * (2 / np.pi) ** 0.5
_GELU = _Gate(np.float32(_ROOT), np.float32(_ROOT * 0.044715))
# All but the exact GELU, whose error function is no sigmoid.
GATES = {
    "swiglu": _SILU,
    "silu": _SILU,
    "geglu_tanh": _GELU,
    "gelu_tanh": _GELU,
    "reglu": _RELU,
    "relu": _RELU,
    "swiglu_oai": _Gate(np.float32(OAI_SLOPE), limit=np.float32(OAI_LIMIT), plus=np.float32(1)),
}


def suits_gates(kind: str, *tensors: Tensor | None) -> bool:
    """Whether these kernels take the activation and the tensors, here and now.

    >>> suits_gates("gelu", torch.ones(2, 2))
    False

    Source: none; plain bookkeeping.
    """
    first = tensors[0]
    return (
        kind in GATES
        and first is not None
        and first.dtype in _DTYPES
        and takes(*tensors)
        and all(one is None or one.ndim < 2 or one.stride(1) == 1 for one in tensors)
        and compiled_here()
    )


def activated(hidden_NH: Tensor, kind: str, out_NF: Tensor, *, interleaved: bool = False) -> None:
    """Writes the activation of ``hidden_NH`` to ``out_NF``, computed in fp32.

    >>> out = torch.empty(1, 1)
    >>> activated(torch.tensor([[-1.0, 2.0]]), "reglu", out) if compiled_here() else out.zero_()  # doctest: +ELLIPSIS
    ...
    >>> float(out)
    0.0

    Source: Shazeer, 2020, "GLU Variants Improve Transformer".
    """
    activate_rows(array(hidden_NH), array(out_NF), kind in GATED, interleaved, *GATES[kind])


def activation_slopes(
    kind: str,
    hidden_NH: Tensor,
    grad_NF: Tensor,
    weight_N: Tensor,
    out_NF: Tensor,
    grad_NH: Tensor,
    grad_weight_N: Tensor | None,
    *,
    interleaved: bool = False,
) -> None:
    """The backward pass of weight * activation(hidden), which it recomputes, in fp32.

    Args:
        kind: the activation.
        hidden_NH: what the activation was taken of.
        grad_NF: gradient of weight * activation(hidden).
        weight_N: the weights, in any of the dtypes.
        out_NF: receives weight * activation(hidden).
        grad_NH: receives the gradient of ``hidden_NH``.
        grad_weight_N: (N,) fp32, receives the gradient of the weights, or None.
        interleaved: whether gate and value alternate.

    Source: as ``activated``.
    """
    of_weight = hidden_NH.new_empty(0, dtype=torch.float32) if grad_weight_N is None else grad_weight_N
    given = (array(one) for one in (hidden_NH, grad_NF, weight_N, out_NF, grad_NH, of_weight))
    slope_rows(*given, kind in GATED, interleaved, *GATES[kind])


@kernel()
def _sigmoid(q):
    return np.float32(1) / (np.float32(1) + exponential(-q))


@kernel()
def _steep(x):
    """The number, or one as far from 0 as a sigmoid tells apart: an infinity would make 0 times it no number."""
    x = np.float32(100) if x > np.float32(100) else x
    return np.float32(-100) if x < np.float32(-100) else x


@kernel()
def _silu_row(gate_F, value_F, out_F, gated):
    one = np.float32(1)
    for f in range(out_F.shape[0]):
        x = wide(gate_F[f])
        out_F[f] = narrow(x / (one + exponential(-x)) * (wide(value_F[f]) if gated else one), out_F[f])


@kernel()
def _row(gate_F, value_F, out_F, gated, a, b, limit, plus, relu, silu):
    if silu:
        _silu_row(gate_F, value_F, out_F, gated)
    else:
        _forward_row(gate_F, value_F, out_F, gated, a, b, limit, plus, relu)


@kernel()
def _forward_row(gate_F, value_F, out_F, gated, a, b, limit, plus, relu):
    zero, one = np.float32(0), np.float32(1)
    for f in range(out_F.shape[0]):
        x = wide(gate_F[f])
        x = limit if x > limit else x
        v = wide(value_F[f])
        v = limit if v > limit else v
        v = (-limit if v < -limit else v) + plus
        t = _steep(x)
        y = x * _sigmoid(t * (a + b * t * t))
        y = (zero if x <= zero else x) if relu else y
        out_F[f] = narrow(y * (v if gated else one), out_F[f])


@kernel(threaded=True)
def activate_rows(h_NH, out_NF, gated, interleaved, a, b, limit, plus, relu, silu):
    """``activated`` as kernels call it."""
    rows, F = out_NF.shape
    for chunk in prange((rows + _ROWS - 1) // _ROWS):
        for n in range(chunk * _ROWS, min(rows, (chunk + 1) * _ROWS)):
            h, out = h_NH[n], out_NF[n]
            if not gated:
                _row(h, h, out, gated, a, b, limit, plus, relu, silu)
            elif interleaved:
                _row(h[0::2], h[1::2], out, gated, a, b, limit, plus, relu, silu)
            else:
                _row(h[:F], h[F:], out, gated, a, b, limit, plus, relu, silu)


@kernel()
def _silu_back_row(gate_F, value_F, grad_F, w, out_F, grad_gate_F, grad_value_F, gated):
    one, total = np.float32(1), np.float32(0)
    for f in range(out_F.shape[0]):
        x, v, da = wide(gate_F[f]), wide(value_F[f]) if gated else one, wide(grad_F[f])
        s = one / (one + exponential(-x))
        y = x * s
        total += da * y * v
        da = da * w
        out_F[f] = narrow(w * y * v, out_F[f])
        grad_gate_F[f] = narrow(da * v * (s + y * (one - s)), out_F[f])
        if gated:
            grad_value_F[f] = narrow(da * y, out_F[f])
    return total


@kernel()
def _back_row(gate_F, value_F, grad_F, w, out_F, grad_gate_F, grad_value_F, gated, a, b, limit, plus, relu, silu):
    if silu:
        return _silu_back_row(gate_F, value_F, grad_F, w, out_F, grad_gate_F, grad_value_F, gated)
    return _backward_row(gate_F, value_F, grad_F, w, out_F, grad_gate_F, grad_value_F, gated, a, b, limit, plus, relu)


@kernel()
def _backward_row(gate_F, value_F, grad_F, w, out_F, grad_gate_F, grad_value_F, gated, a, b, limit, plus, relu):
    """The gradient of the row's weight."""
    zero, one, three = np.float32(0), np.float32(1), np.float32(3)
    total = np.float32(0)
    for f in range(out_F.shape[0]):
        x0, v0, da = wide(gate_F[f]), wide(value_F[f]), wide(grad_F[f])
        x = limit if x0 > limit else x0
        v = limit if v0 > limit else v0
        v = -limit if v < -limit else v
        within = v == v0
        v = v + plus if gated else one
        t = _steep(x)
        s = _sigmoid(t * (a + b * t * t))
        y, slope = x * s, s + t * s * (one - s) * (a + three * b * t * t)
        y = (zero if x <= zero else x) if relu else y
        slope = (zero if x <= zero else one) if relu else slope
        total += da * y * v
        da = da * w
        out_F[f] = narrow(w * y * v, out_F[f])
        grad_gate_F[f] = narrow(zero if x0 > limit else da * v * slope, out_F[f])
        if gated:
            grad_value_F[f] = narrow(da * y if within else zero, out_F[f])
    return total


@kernel(threaded=True)
def slope_rows(h_NH, da_NF, w_N, out_NF, dh_NH, dw_N, gated, interleaved, a, b, limit, plus, relu, silu):
    """``activation_slopes`` as kernels call it; without gradients of weights ``dw_N`` is empty."""
    rows, F = out_NF.shape
    for chunk in prange((rows + _ROWS - 1) // _ROWS):
        for n in range(chunk * _ROWS, min(rows, (chunk + 1) * _ROWS)):
            h, da, w, out, dh = h_NH[n], da_NF[n], wide(w_N[n]), out_NF[n], dh_NH[n]
            if not gated:
                dw = _back_row(h, h, da, w, out, dh, dh, gated, a, b, limit, plus, relu, silu)
            elif interleaved:
                halves = h[0::2], h[1::2], dh[0::2], dh[1::2]
                dw = _back_row(
                    halves[0], halves[1], da, w, out, halves[2], halves[3], gated, a, b, limit, plus, relu, silu
                )
            else:
                dw = _back_row(h[:F], h[F:], da, w, out, dh[:F], dh[F:], gated, a, b, limit, plus, relu, silu)
            if dw_N.shape[0]:
                dw_N[n] = dw
