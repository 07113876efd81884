"""Rows against a matrix that a table describes, whatever its numbers and its order in memory."""

import numpy as np

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import wide
from turnout.run.compiled.tables import FLOAT, brains, floats

__all__ = ["across", "along", "times"]

# As many rows of a matrix as stay in the processor's cache until all rows of the other factor have met them.
_BLOCK = 16


@kernel()
def _four(a_I, b_I, c_I, d_I, row_I):
    """The sums of four rows with the weights of one output."""
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for i in range(row_I.shape[0]):
        w = wide(row_I[i])
        a += w * a_I[i]
        b += w * b_I[i]
        c += w * c_I[i]
        d += w * d_I[i]
    return a, b, c, d


@kernel()
def _two(a_I, b_I, row_I):
    a, b = np.float32(0), np.float32(0)
    for i in range(row_I.shape[0]):
        w = wide(row_I[i])
        a += w * a_I[i]
        b += w * b_I[i]
    return a, b


@kernel()
def _one(a_I, row_I):
    a = np.float32(0)
    for i in range(row_I.shape[0]):
        a += wide(row_I[i]) * a_I[i]
    return a


@kernel()
def along(x_MI, weight, stride, bias_O, out_MO):
    """out[m, o] = bias[o] + sum over i of x[m, i] weight[o stride + i]: each output's weights lie after each other."""
    M, outs = out_MO.shape
    ins = x_MI.shape[1]
    for o in range(outs):
        row_I, bias, m = weight[o * stride : o * stride + ins], np.float32(0), 0
        if bias_O.shape[0]:
            bias = bias_O[o]
        while m + 4 <= M:
            a, b, c, d = _four(x_MI[m], x_MI[m + 1], x_MI[m + 2], x_MI[m + 3], row_I)
            out_MO[m, o], out_MO[m + 1, o], out_MO[m + 2, o], out_MO[m + 3, o] = a + bias, b + bias, c + bias, d + bias
            m += 4
        if m + 2 <= M:
            a, b = _two(x_MI[m], x_MI[m + 1], row_I)
            out_MO[m, o], out_MO[m + 1, o] = a + bias, b + bias
            m += 2
        if m < M:
            out_MO[m, o] = _one(x_MI[m], row_I) + bias


@kernel()
def across(x_MI, weight, stride, bias_O, out_MO):
    """out[m, o] = bias[o] + sum over i of x[m, i] weight[i stride + o]: each input's weights lie after each other."""
    M, ins = x_MI.shape
    outs = out_MO.shape[1]
    for m in range(M):
        for o in range(outs):
            out_MO[m, o] = bias_O[o] if bias_O.shape[0] else np.float32(0)
    for start in range(0, ins, _BLOCK):
        end, m = min(ins, start + _BLOCK), 0
        while m + 2 <= M:
            a_O, b_O = out_MO[m], out_MO[m + 1]
            for i in range(start, end):
                row_O, a, b = weight[i * stride : i * stride + outs], x_MI[m, i], x_MI[m + 1, i]
                for o in range(outs):
                    w = wide(row_O[o])
                    a_O[o] += a * w
                    b_O[o] += b * w
            m += 2
        if m < M:
            a_O = out_MO[m]
            for i in range(start, end):
                row_O, a = weight[i * stride : i * stride + outs], x_MI[m, i]
                for o in range(outs):
                    a_O[o] += a * wide(row_O[o])


@kernel()
def times(matrix, e, x_MI, out_MO):
    """Out = x times the e-th matrix of a stack, plus its bias."""
    at, ins, outs, stride = matrix.at + e * matrix.next, matrix.inputs, matrix.outputs, matrix.stride
    bias_O = floats(matrix.bias + e * matrix.bias_next * 4, outs if matrix.bias != 0 else 0)
    if matrix.by_input != 0:
        count = (ins - 1) * stride + outs
        if matrix.code == FLOAT:
            across(x_MI, floats(at, count), stride, bias_O, out_MO)
        else:
            across(x_MI, brains(at, count), stride, bias_O, out_MO)
    else:
        count = (outs - 1) * stride + ins
        if matrix.code == FLOAT:
            along(x_MI, floats(at, count), stride, bias_O, out_MO)
        else:
            along(x_MI, brains(at, count), stride, bias_O, out_MO)
