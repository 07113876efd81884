"""Exponentials with their limits, and the activations of the feed-forward layers of a step."""

import numpy as np

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.pointwise import exponential, gated

__all__ = ["ACTIVATIONS", "GATED", "activated", "bounded", "grown"]

# The numbers that a table gives activations; gated ones first.
ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "gelu", "gelu_tanh", "relu", "silu")
GATED = 5
_LOW = np.float32(-87.3)
_ONE, _TWO = np.float32(1), np.float32(2)


@kernel()
def grown(x):
    """e^x, 0 below what fp32 has exponents for and infinity above; NaN stays NaN."""
    return np.float32(0) if x < _LOW else exponential(x)


@kernel()
def bounded(x):
    """tanh(x), within 1e-7."""
    return _ONE - _TWO / (grown(_TWO * x) + _ONE)


@kernel()
def activated(wide_MH, code, first, last, out_MF):
    """What lies between the two products of a feed-forward layer, from one hidden number to another.

    Where there is a gate, it is first and the value last.
    """
    hidden = out_MF.shape[1]
    for m in range(out_MF.shape[0]):
        gate_F, out_F = wide_MH[m, first:last], out_MF[m, first:last]
        if code < GATED:
            gated(code, True, gate_F, wide_MH[m, hidden + first : hidden + last], out_F)
        else:  # those without a gate do to all what those with one do to it, and come after them in the same order
            gated((code - GATED + 1) % 4, False, gate_F, gate_F, out_F)
