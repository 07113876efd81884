"""Many rows against matrices stored (out, in): each expert's product, with neither packed nor turned beforehand.

torch's products pack a matrix before they use it, which is made for matrices that meet thousands of rows. Here rows and
weights are read as they lie, and the next weights are fetched while these are used (``turnout.run.compiled.dot_tile``).
"""

import functools

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.dot_tile import OUTS, ROWS, dot_tile, dot_tile_1, dot_tile_2
from turnout.run.compiled.engine import array, compiled_here, kernel, takes
from turnout.run.compiled.fetch import LINE
from turnout.run.compiled.lanes import features, prange
from turnout.run.compiled.vectors import WIDE

__all__ = ["able", "dot_all", "dots", "rows_at_once", "suits_dots", "with_outputs"]

# Outputs that one thread makes at a time: their weights stay in its cache while rows pass by, so many bytes at once.
_CHUNK, _PASS = 64, 1 << 18
_NEEDS = {torch.float32: {"avx512f"}, torch.bfloat16: {"avx512f", "avx512vl", "avx512bf16"}}


@functools.cache
def able(dtype: torch.dtype) -> bool:
    """Whether the processor that kernels are compiled for has what tiles of this dtype are made of.

    >>> able(torch.float64)
    False

    Source: none; plain bookkeeping.
    """
    return dtype in _NEEDS and features() >= _NEEDS[dtype]


def suits_dots(row_NI: Tensor, stack_EIO: Tensor) -> bool:
    """Whether ``dots`` takes rows and matrices like these, here and now: AVX-512, in bf16 with its products of pairs.

    >>> suits_dots(torch.ones(4, 16, dtype=torch.float64), torch.ones(2, 8, 16).transpose(1, 2))
    False

    Source: none; plain bookkeeping.
    """
    ins, outs = stack_EIO.shape[1:]
    unit = WIDE if row_NI.dtype == torch.float32 else 2 * WIDE
    return (
        row_NI.dtype == stack_EIO.dtype
        and not ins % unit
        and not outs % OUTS
        and compiled_here()
        and takes(row_NI, stack_EIO)
        and able(row_NI.dtype)
        and row_NI.is_contiguous()
        and stack_EIO.transpose(1, 2).is_contiguous()
    )


def dots(row_NI: Tensor, stack_EIO: Tensor, expert_G: list[int], bound_G: list[int], out_NO: Tensor) -> None:
    """Each expert's rows times its matrix, summed in fp32; a row's bits do not depend on its neighbours or on threads.

    Args:
        row_NI: the rows of some experts, one expert's after the other's; as ``suits_dots`` asks.
        stack_EIO: the matrices of all experts, stored (E, O, I).
        expert_G: which experts.
        bound_G: where each one's rows begin and the last one's end, one more than experts; counted from the first.
        out_NO: what is written to, contiguous, in the same dtype.

    >>> rows, stack, out = torch.ones(1, 16), torch.ones(1, 4, 16).transpose(1, 2), torch.empty(1, 4)
    >>> _ = dots(rows, stack, [0], [0, 1], out) if suits_dots(rows, stack) else out.fill_(16)
    >>> out.tolist()
    [[16.0, 16.0, 16.0, 16.0]]

    Source: Goto & van de Geijn, 2008, "Anatomy of High-Performance Matrix Multiplication", without its packing.
    """
    ins, outs = stack_EIO.shape[1:]
    rows, weights, out = (array(one).reshape(-1) for one in (row_NI, stack_EIO.transpose(1, 2), out_NO))
    some = rows_at_once(ins * row_NI.element_size())
    bound = np.array(bound_G) - bound_G[0]
    dot_all(rows, weights, np.array(expert_G), bound, out, ins, outs, some, LINE // row_NI.element_size())


def rows_at_once(size: int) -> int:
    """As many rows of so many bytes as pass by the weights of a chunk of outputs at a time.

    >>> rows_at_once(1024)
    256

    Source: none; plain bookkeeping.
    """
    return max(ROWS, _PASS // size // ROWS * ROWS)


@kernel(exact=True)
def with_outputs(x, first, last, w, at, out, to, ins, outs, then, next_at, lines, line):
    """Rows [first, last) with OUTS outputs whose weights begin at w[at], while lines of ``then`` are fetched."""
    # Four rows at a time, then two, then one: whichever tile makes a row, it has the same bits.
    whole, rest = (last - first) // ROWS, (last - first) % ROWS
    tiles = whole + rest // 2 + rest % 2
    steps = ins * x.itemsize // LINE
    each = (lines + tiles * steps - 1) // (tiles * steps)
    m, end = first, next_at + lines * line
    for tile in range(tiles):
        if next_at >= end:
            each = 0
        if tile < whole:
            dot_tile(x, m * ins, ins, w, at, out, m * outs + to, outs, ins, then, next_at, each, line)
            m += ROWS
        elif last - m > 1:
            dot_tile_2(x, m * ins, ins, w, at, out, m * outs + to, outs, ins, then, next_at, each, line)
            m += 2
        else:
            dot_tile_1(x, m * ins, ins, w, at, out, m * outs + to, outs, ins, then, next_at, each, line)
            m += 1
        next_at += steps * each * line


@kernel(threaded=True, exact=True)
def dot_all(x, w, expert_G, bound_G, out, ins, outs, some, line):
    """``dots`` as kernels call it, ``some`` rows at a time."""
    parts = (outs + _CHUNK - 1) // _CHUNK
    for job in prange(expert_G.shape[0] * parts):
        g, begin = job // parts, job % parts * _CHUNK
        start = expert_G[g] * outs * ins
        for first in range(bound_G[g], bound_G[g + 1], some):
            last = min(first + some, bound_G[g + 1])
            for o in range(begin, min(begin + _CHUNK, outs), OUTS):
                at, lines = start + o * ins, OUTS * ins // line if first == bound_G[g] else 0
                with_outputs(x, first, last, w, at, out, o, ins, outs, w, at + OUTS * ins, lines, line)
