"""Exponentials with their limits, and the activations of the feed-forward layers of a step."""

import numpy as np

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.pointwise import activated as of_gate
from turnout.run.compiled.pointwise import clamped, exponential

__all__ = ["ACTIVATIONS", "GATED", "activated", "bounded", "grown"]

# The numbers that a table gives activations; gated ones first.
ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "gelu", "gelu_tanh", "relu", "silu")
GATED = 5
_LOW, _HIGH = np.float32(-87.3), np.float32(88.7)
_ONE, _TWO = np.float32(1), np.float32(2)


@kernel()
def grown(x):
    """e^x, 0 below what fp32 has exponents for and infinity above; NaN stays NaN."""
    y = np.float32(0) if x < _LOW else exponential(x)
    return np.float32(np.inf) if x > _HIGH else y


@kernel()
def bounded(x):
    """tanh(x), within 1e-7."""
    return _ONE - _TWO / (grown(_TWO * x) + _ONE)


@kernel(inside=True)
def _each(kind, gated, gate_F, value_F, out_F):
    for f in range(out_F.shape[0]):
        gate, value = clamped(kind, gate_F[f], value_F[f])
        gate = of_gate(kind, gate)
        out_F[f] = gate * value if gated else gate


@kernel()
def _of_kind(kind, gated, gate_F, value_F, out_F):
    """A loop for each kind, without branches: LLVM makes vectors of it, which take a tenth of the time."""
    if kind == 0:
        _each(0, gated, gate_F, value_F, out_F)
    elif kind == 1:
        _each(1, gated, gate_F, value_F, out_F)
    elif kind == 2:
        _each(2, gated, gate_F, value_F, out_F)
    elif kind == 3:
        _each(3, gated, gate_F, value_F, out_F)
    else:
        _each(4, gated, gate_F, value_F, out_F)


@kernel()
def activated(wide_MH, code, first, last, out_MF):
    """What lies between the two products of a feed-forward layer, from one hidden number to another.

    Where there is a gate, it is first and the value last.
    """
    hidden = out_MF.shape[1]
    for m in range(out_MF.shape[0]):
        gate_F, out_F = wide_MH[m, first:last], out_MF[m, first:last]
        if code < GATED:
            _of_kind(code, True, gate_F, wide_MH[m, hidden + first : hidden + last], out_F)
        else:  # those without a gate do to all what those with one do to it, and come after them in the same order
            _of_kind((code - GATED + 1) % 4, False, gate_F, gate_F, out_F)
