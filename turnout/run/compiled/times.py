"""Rows against a matrix that a table describes, whatever its numbers and its order in memory."""

import numpy as np

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import prange, wide
from turnout.run.compiled.tables import (
    AT,
    BIAS,
    BIAS_NEXT,
    BY_INPUT,
    CODE,
    FLOAT,
    INS,
    NEXT,
    OUTS,
    STRIDE,
    brains,
    floats,
)

__all__ = ["across", "along", "share", "spread", "times"]

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
def along(x_MI, weight, stride, out_MO, first, last):
    """out[m, o] = sum over i of x[m, i] weight[o stride + i]: each output's weights lie after each other."""
    rows, ins = x_MI.shape
    for o in range(first, last):
        row_I, m = weight[o * stride : o * stride + ins], 0
        while m + 4 <= rows:
            a, b, c, d = _four(x_MI[m], x_MI[m + 1], x_MI[m + 2], x_MI[m + 3], row_I)
            out_MO[m, o], out_MO[m + 1, o], out_MO[m + 2, o], out_MO[m + 3, o] = a, b, c, d
            m += 4
        if m + 2 <= rows:
            out_MO[m, o], out_MO[m + 1, o] = _two(x_MI[m], x_MI[m + 1], row_I)
            m += 2
        if m < rows:
            out_MO[m, o] = _one(x_MI[m], row_I)


@kernel()
def across(x_MI, weight, stride, out_MO, first, last):
    """out[m, o] = sum over i of x[m, i] weight[i stride + o]: each input's weights lie after each other."""
    rows, ins = x_MI.shape
    for m in range(rows):
        for o in range(first, last):
            out_MO[m, o] = np.float32(0)
    for start in range(0, ins, _BLOCK):
        end, m = min(ins, start + _BLOCK), 0
        while m + 2 <= rows:
            a_O, b_O = out_MO[m, first:last], out_MO[m + 1, first:last]
            for i in range(start, end):
                row_O, a, b = weight[i * stride + first : i * stride + last], x_MI[m, i], x_MI[m + 1, i]
                for o in range(row_O.shape[0]):
                    w = wide(row_O[o])
                    a_O[o] += a * w
                    b_O[o] += b * w
            m += 2
        if m < rows:
            a_O = out_MO[m, first:last]
            for i in range(start, end):
                row_O, a = weight[i * stride + first : i * stride + last], x_MI[m, i]
                for o in range(row_O.shape[0]):
                    a_O[o] += a * wide(row_O[o])


@kernel()
def times(table, which, e, x_MI, out_MO, first, last):
    """Out = x times the e-th matrix of a stack, plus its bias, from one output to another."""
    at, stride = table[which, AT] + e * table[which, NEXT], table[which, STRIDE]
    ins, outs = table[which, INS], table[which, OUTS]
    if table[which, BY_INPUT] != 0:
        count = (ins - 1) * stride + outs
        if table[which, CODE] == FLOAT:
            across(x_MI, floats(at, count), stride, out_MO, first, last)
        else:
            across(x_MI, brains(at, count), stride, out_MO, first, last)
    else:
        count = (outs - 1) * stride + ins
        if table[which, CODE] == FLOAT:
            along(x_MI, floats(at, count), stride, out_MO, first, last)
        else:
            along(x_MI, brains(at, count), stride, out_MO, first, last)
    if table[which, BIAS] != 0:
        bias_O = floats(table[which, BIAS] + e * table[which, BIAS_NEXT] * 4, outs)
        for m in range(out_MO.shape[0]):
            for o in range(first, last):
                out_MO[m, o] += bias_O[o]


@kernel()
def share(count, part, parts):
    """Where one of some equal parts begins; borders of vectors where there are enough."""
    if part == parts:
        return count
    return count * part // parts // 16 * 16


@kernel(threaded=True)
def spread(table, which, x_MI, out_MO, parts):
    """Out = x times a matrix, plus its bias; each thread makes a part of the outputs."""
    outs = table[which, OUTS]
    for part in prange(parts):
        times(table, which, 0, x_MI, out_MO, share(outs, part, parts), share(outs, part + 1, parts))
