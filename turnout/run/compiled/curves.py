"""Exponentials with their limits, and the activations of the feed-forward layers of a step."""

import numpy as np

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.pointwise import exponential, gated_here, ungated_here

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
def activated(wide_MH, code, first, last, hidden):
    """What lies between the two products of a feed-forward layer, in place, from one hidden number to another.

    Where there is a gate, it is first and the value last.
    """
    for m in range(wide_MH.shape[0]):
        gate_F = wide_MH[m, first:last]
        if code < GATED:
            gated_here(code, gate_F, wide_MH[m, hidden + first : hidden + last])
        else:  # those without a gate do to all what those with one do to it, and come after them in the same order
            ungated_here((code - GATED + 1) % 4, gate_F)
