"""The activations of ``turnout.run.activate`` for kernels, one number at a time: LLVM makes vectors of them."""

import math

import numpy as np

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.floats import as_bits, as_float, fused
from turnout.types.weights import OAI_LIMIT, OAI_SLOPE

__all__ = ["KINDS", "activated", "exponential", "gated", "gated_here", "ungated_here"]

# What g is, of act(h) = g(gate) * value or act(h) = g(h); "oai" takes clamped gates and values + 1.
KINDS = {"swiglu": 0, "silu": 0, "geglu": 1, "gelu": 1, "geglu_tanh": 2, "gelu_tanh": 2, "reglu": 3, "relu": 3}
KINDS |= {"swiglu_oai": 4}

_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_SHIFT = np.float32(3 << 22)
_LEAST, _MOST = np.float32(-87.3), np.float32(88.7)
_C = tuple(np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2))
_C3, _C2, _ONE = np.float32(1.6666665459e-1), np.float32(0.5), np.float32(1)
_SLOPE, _LIMIT = np.float32(OAI_SLOPE), np.float32(OAI_LIMIT)
_TANH, _CUBE = np.float32(2 * math.sqrt(2 / math.pi)), np.float32(0.044715)
_ROOT = np.float32(math.sqrt(0.5))


@kernel(exact=True)
def exponential(x):
    """The power x of e, within 2 units in the last place; infinity above fp32's range, 1e-38 below it, NaN stays NaN.

    Source: Moshier, 1989, "Methods and Programs for Mathematical Functions" (Cephes, expf).
    """
    t = _LEAST if x < _LEAST else x
    t = _MOST if t > _MOST else t
    # Beside so large a number there is room for no fraction: the sum's last bits are the power of two.
    shifted = fused(t, _LOG2_E, _SHIFT)
    n = shifted - _SHIFT
    r = fused(n, -_LN2_LOW, fused(n, -_LN2_HIGH, t))
    p = fused(fused(fused(fused(fused(_C[0], r, _C[1]), r, _C[2]), r, _C[3]), r, _C3), r, _C2)
    y = as_float(as_bits(fused(p * r, r, r + _ONE)) + (as_bits(shifted) << np.int32(23)))
    y = np.float32(np.inf) if x > _MOST else y
    return y if x == x else x


@kernel(exact=True)
def _sigmoid(x):
    return _ONE / (_ONE + exponential(-x))


@kernel(exact=True)
def activated(kind, gate):
    """g(gate)."""
    if kind == 0:
        return gate * _sigmoid(gate)
    if kind == 1:
        return gate * _C2 * (_ONE + np.float32(math.erf(gate * _ROOT)))
    if kind == 2:  # x / 2 (1 + tanh u) is x sigmoid(2 u)
        return gate * _sigmoid(_TANH * (gate + _CUBE * gate * gate * gate))
    if kind == 3:
        return np.float32(0) if gate < 0 else gate
    return gate * _sigmoid(_SLOPE * gate)


@kernel(exact=True)
def _clamped(kind, gate, value):
    """Gate and value as this kind takes them."""
    if kind == 4:
        gate = _LIMIT if gate > _LIMIT else gate
        value = _LIMIT if value > _LIMIT else value
        value = (-_LIMIT if value < -_LIMIT else value) + _ONE
    return gate, value


@kernel(exact=True, inside=True)
def _each(kind, gates, gate_F, value_F, out_F):
    for f in range(out_F.shape[0]):
        gate, value = _clamped(kind, gate_F[f], value_F[f])
        gate = activated(kind, gate)
        out_F[f] = gate * value if gates else gate


@kernel(exact=True)
def gated(kind, gates, gate_F, value_F, out_F):
    """Activations, written elsewhere; without gates the values are not looked at.

    Each kind has a loop without branches, of which LLVM makes vectors: a tenth of the time. It does not where the loop
    finds that it writes to what it reads: see ``gated_here``.
    """
    if kind == 0:
        _each(0, gates, gate_F, value_F, out_F)
    elif kind == 1:
        _each(1, gates, gate_F, value_F, out_F)
    elif kind == 2:
        _each(2, gates, gate_F, value_F, out_F)
    elif kind == 3:
        _each(3, gates, gate_F, value_F, out_F)
    else:
        _each(4, gates, gate_F, value_F, out_F)


@kernel(exact=True)
def gated_here(kind, gate_F, value_F):
    """Activations in the place of their gates, which LLVM is told: one name, and so vectors."""
    if kind == 0:
        _each(0, True, gate_F, value_F, gate_F)
    elif kind == 1:
        _each(1, True, gate_F, value_F, gate_F)
    elif kind == 2:
        _each(2, True, gate_F, value_F, gate_F)
    elif kind == 3:
        _each(3, True, gate_F, value_F, gate_F)
    else:
        _each(4, True, gate_F, value_F, gate_F)


@kernel(exact=True)
def ungated_here(kind, gate_F):
    """The same of a layer that has no values."""
    if kind == 0:
        _each(0, False, gate_F, gate_F, gate_F)
    elif kind == 1:
        _each(1, False, gate_F, gate_F, gate_F)
    elif kind == 2:
        _each(2, False, gate_F, gate_F, gate_F)
    else:
        _each(3, False, gate_F, gate_F, gate_F)
