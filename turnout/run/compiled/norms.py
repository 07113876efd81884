"""Norms and the rotary embedding of the rows of a step, by tables."""

import math

import numpy as np

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.tables import floats

__all__ = ["angles", "neighbours_turned", "normed", "turned"]


@kernel()
def normed(norm, x_I, out_I):
    """Weight x / sqrt(mean(x^2) + eps), or of x less its mean, plus a bias; ``out`` may be ``x``."""
    size = x_I.shape[0]
    weight_I, middle, square = floats(norm.weight, size), np.float32(0), np.float32(0)
    if norm.layer != 0:
        for i in range(size):
            middle += x_I[i]
        middle /= np.float32(size)
    for i in range(size):
        square += (x_I[i] - middle) * (x_I[i] - middle)
    inverse = np.float32(1) / np.sqrt(square / np.float32(size) + norm.eps)
    if norm.bias != 0:
        bias_I = floats(norm.bias, size)
        for i in range(size):
            out_I[i] = (x_I[i] - middle) * inverse * weight_I[i] + bias_I[i]
    else:
        for i in range(size):
            out_I[i] = (x_I[i] - middle) * inverse * weight_I[i]


@kernel()
def angles(address, place_B, magnitude, cos_BP, sin_BP):
    """The cosines and sines that turn each row's heads at its place; angles in fp32, as the model's own."""
    B, P = cos_BP.shape
    frequency_P = floats(address, P)
    for b in range(B):
        for p in range(P):
            angle = np.float32(place_B[b]) * frequency_P[p]
            cos_BP[b, p], sin_BP[b, p] = (
                np.float32(math.cos(angle)) * magnitude,
                np.float32(math.sin(angle)) * magnitude,
            )


@kernel()
def turned(head_W, cos_P, sin_P):
    """The first 2 P numbers of a head turned in place, pair p being p and p + P."""
    P = cos_P.shape[0]
    for p in range(P):
        a, b = head_W[p], head_W[p + P]
        head_W[p] = a * cos_P[p] - b * sin_P[p]
        head_W[p + P] = b * cos_P[p] + a * sin_P[p]


@kernel()
def neighbours_turned(head_W, cos_P, sin_P, out_W):
    """The same of pairs 2 p and 2 p + 1, which come out as p and p + P."""
    P = cos_P.shape[0]
    for p in range(P):
        a, b = head_W[2 * p], head_W[2 * p + 1]
        out_W[p] = a * cos_P[p] - b * sin_P[p]
        out_W[p + P] = b * cos_P[p] + a * sin_P[p]
