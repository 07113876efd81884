"""Exponentials that a compiler can put into vectors, and the activations of feed-forward layers made of them."""

import math

import numpy as np

from turnout.run.compiled.engine import kernel
from turnout.types.weights import OAI_LIMIT, OAI_SLOPE

__all__ = ["ACTIVATIONS", "GATED", "activated", "bounded", "grown"]

# The numbers that a table gives activations; gated ones first.
ACTIVATIONS = ("swiglu", "geglu", "geglu_tanh", "reglu", "swiglu_oai", "gelu", "gelu_tanh", "relu", "silu")
GATED = 5
_PER_LN2, _LN2 = np.float32(1 / math.log(2)), math.log(2)
_LOW, _HIGH = np.float32(-87.3), np.float32(88.7)
_ROOT_HALF, _ROOT_2_PI = np.float32(math.sqrt(0.5)), np.float32(math.sqrt(2 / math.pi))
_SLOPE, _LIMIT = np.float32(OAI_SLOPE), np.float32(OAI_LIMIT)
_ONE, _TWO, _HALF = np.float32(1), np.float32(2), np.float32(0.5)
_CUBIC = np.float32(0.044715)
_P2, _P3, _P4, _P5, _P6, _P7 = (np.float32(1 / math.factorial(n)) for n in range(2, 8))


@kernel()
def grown(x):
    """e^x within 6e-7 of itself: e^x = 2^n e^r with |r| <= ln 2 / 2. Below -87.3 it is 0, NaN stays NaN."""
    n = np.floor(x * _PER_LN2 + _HALF)
    n = min(max(n, np.float32(-126)), np.float32(127))
    r = np.float32(np.float64(x) - np.float64(n) * _LN2)  # in fp32 the difference would lose what the product rounds
    p = _P6 + r * _P7
    p = _P4 + r * (_P5 + r * p)
    p = _ONE + r * (_ONE + r * (_P2 + r * (_P3 + r * p)))
    y = p * np.uint32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    y = np.float32(0) if x < _LOW else y
    return np.float32(np.inf) if x > _HIGH else y


@kernel()
def bounded(x):
    """tanh(x), within 1e-7."""
    return _ONE - _TWO / (grown(_TWO * x) + _ONE)


@kernel()
def _bent(x, code):
    """What an activation does to its gate."""
    if code == 0 or code == 8:
        return x / (_ONE + grown(-x))
    if code == 4:
        return x / (_ONE + grown(-_SLOPE * x))
    if code == 3 or code == 7:
        return x if x > np.float32(0) or x != x else np.float32(0)
    if code == 2 or code == 6:
        return _HALF * x * (_ONE + bounded(_ROOT_2_PI * (x + _CUBIC * x * x * x)))
    return _HALF * x * (_ONE + np.float32(math.erf(x * _ROOT_HALF)))


@kernel()
def activated(wide_MH, code, first, last, out_MF):
    """What lies between the two products of a feed-forward layer, from one hidden number to another.

    Where there is a gate, it is first and the value last.
    """
    hidden = out_MF.shape[1]
    for m in range(out_MF.shape[0]):
        gate_F, out_F = wide_MH[m], out_MF[m]
        if code == 0:
            value_F = wide_MH[m, hidden:]
            for f in range(first, last):
                out_F[f] = gate_F[f] / (_ONE + grown(-gate_F[f])) * value_F[f]
        elif code == 4:
            value_F = wide_MH[m, hidden:]
            for f in range(first, last):
                value = min(max(value_F[f], -_LIMIT), _LIMIT) + _ONE
                out_F[f] = _bent(min(gate_F[f], _LIMIT), code) * value
        elif code < GATED:
            value_F = wide_MH[m, hidden:]
            for f in range(first, last):
                out_F[f] = _bent(gate_F[f], code) * value_F[f]
        else:
            for f in range(first, last):
                out_F[f] = _bent(gate_F[f], code)
