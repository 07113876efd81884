"""Many rows against matrices stored (in, out), and sums of outer products: what going back through ``dots`` asks for.

As there, nothing is turned; 64 columns of a matrix at a time are copied to where they lie side by side, in bfloat16 two
rows in one word, and the next ones are fetched while these are used.
"""

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.broad_tile import COLUMNS, ROWS, broad_tile, broad_tile_1, lay_columns
from turnout.run.compiled.dots import able
from turnout.run.compiled.engine import array, compiled_here, kernel, takes, threads
from turnout.run.compiled.fetch import LINE, fetch
from turnout.run.compiled.lanes import prange

__all__ = [
    "broad_all",
    "broads",
    "laid",
    "lay",
    "outer_all",
    "outers",
    "pair_all",
    "panel",
    "suits_broads",
    "suits_outers",
    "words_room",
]

# The most words that are summed over: as many rows of COLUMNS words stay in a processor's second cache.
_MOST = 2048


def suits_broads(row_NI: Tensor, stack_EIO: Tensor) -> bool:
    """Whether ``broads`` takes rows and matrices like these, here and now.

    >>> suits_broads(torch.ones(4, 16, dtype=torch.float64), torch.ones(2, 16, 64))
    False

    Source: none; plain bookkeeping.
    """
    ins, outs = stack_EIO.shape[1:]
    return (
        row_NI.dtype == stack_EIO.dtype
        and outs >= COLUMNS
        and laid(ins, row_NI) <= _MOST
        and (row_NI.dtype == torch.float32 or not ins % 2)
        and compiled_here()
        and takes(row_NI, stack_EIO)
        and able(row_NI.dtype)
        and row_NI.is_contiguous()
        and stack_EIO.is_contiguous()
    )


def suits_outers(left_NO: Tensor, right_NI: Tensor, grad_EOI: Tensor, most: int) -> bool:
    """Whether ``outers`` takes these, of at most so many rows for each expert, here and now.

    >>> suits_outers(torch.ones(4, 16), torch.ones(4, 64), torch.ones(2, 16, 64, dtype=torch.float64), 4)
    False

    Source: none; plain bookkeeping.
    """
    return (
        left_NO.dtype == right_NI.dtype == grad_EOI.dtype
        and right_NI.shape[1] >= COLUMNS
        and left_NO.shape[1] >= ROWS
        and laid(most, left_NO) <= _MOST
        and compiled_here()
        and takes(left_NO, right_NI, grad_EOI)
        and able(left_NO.dtype)
        and left_NO.is_contiguous()
        and right_NI.is_contiguous()
        and grad_EOI.is_contiguous()
    )


def broads(row_NI: Tensor, stack_EIO: Tensor, expert_G: list[int], bound_G: list[int], out_NO: Tensor) -> None:
    """Each expert's rows times its matrix, summed in fp32: as ``turnout.run.compiled.dots``, stored (E, I, O).

    >>> rows, stack, out = torch.ones(1, 2), torch.ones(1, 2, 64), torch.empty(1, 64)
    >>> _ = broads(rows, stack, [0], [0, 1], out) if suits_broads(rows, stack) else out.fill_(2)
    >>> float(out.sum())
    128.0

    Source: Goto & van de Geijn, 2008, "Anatomy of High-Performance Matrix Multiplication".
    """
    ins, outs = stack_EIO.shape[1:]
    rows, weights, out = (array(one).reshape(-1) for one in (row_NI, stack_EIO, out_NO))
    parts, many = threads(), 1 + (row_NI.dtype != torch.float32)
    room = words_room(row_NI, parts * laid(ins, row_NI) * COLUMNS)
    bound = np.array(bound_G) - bound_G[0]
    broad_all(
        rows, weights, np.array(expert_G), bound, out, ins, outs, many, LINE // row_NI.element_size(), room, parts
    )


def outers(left_NO: Tensor, right_NI: Tensor, expert_G: list[int], bound_G: list[int], grad_EOI: Tensor) -> None:
    """Writes each expert's left^T right over its rows to its place, summed in fp32.

    Args:
        left_NO: rows of some experts, one expert's after the other's; as ``suits_outers`` asks.
        right_NI: the same rows' other factor.
        expert_G: which experts.
        bound_G: where each one's rows begin and the last one's end, one more than experts; counted from the first.
        grad_EOI: of all experts.

    >>> left, right, grad = torch.ones(3, 6), torch.ones(3, 64), torch.zeros(1, 6, 64)
    >>> _ = outers(left, right, [0], [0, 3], grad) if suits_outers(left, right, grad, 3) else grad.fill_(3)
    >>> float(grad.sum()) == 3 * 6 * 64
    True

    Source: as ``broads``.
    """
    (_, outs), ins = left_NO.shape, right_NI.shape[1]
    left, right, grad = (array(one).reshape(-1) for one in (left_NO, right_NI, grad_EOI))
    parts, bound = threads(), np.array(bound_G) - bound_G[0]
    words = laid(int(np.diff(bound).max()), left_NO)
    # In 16 bits the left factor is laid out in pairs of rows first, which each expert begins anew.
    pairs = left
    line = LINE // left_NO.element_size()
    many = 1 + (left_NO.dtype != torch.float32)
    if many == 2:
        pairs = words_room(left_NO, sum(-(-n // 2) for n in np.diff(bound).tolist()) * outs)
        pair_all(left, bound, outs, pairs)
    room = words_room(left_NO, parts * words * COLUMNS)
    outer_all(pairs, right, np.array(expert_G), bound, grad, outs, ins, many, line, room, parts, words)


def laid(count: int, like: Tensor) -> int:
    """How many words hold so many numbers of a column."""
    return count if like.dtype == torch.float32 else -(-count // 2)


def words_room(like: Tensor, words: int) -> np.ndarray:
    """Room for so many words."""
    return array(like.new_empty(words, dtype=torch.float32 if like.dtype == torch.float32 else torch.int32))


@kernel(exact=True)
def _copy(row_V, word_V):
    for v in range(word_V.shape[0]):
        word_V[v] = row_V[v]


@kernel(exact=True)
def _pair(low_V, high_V, word_V):
    for v in range(word_V.shape[0]):
        word_V[v] = np.int32(low_V[v]) | (np.int32(high_V[v]) << np.int32(16))


@kernel(exact=True)
def lay(b, at, stride, count, many, room, to):
    """Rows of COLUMNS to words side by side: one row in each word, or two that follow each other."""
    whole = count - count % many
    for k in range(0, whole, many):
        lay_columns(b, at + k * stride, at + (k + many - 1) * stride, room, to)
        to += COLUMNS
    if whole < count:  # in 16 bits the last one alone, with zeros beside it
        first = at + whole * stride
        _copy(b[first : first + COLUMNS], room[to : to + COLUMNS])


@kernel(exact=True)
def pair_all(rows, bound_G, width, room):
    """Words of room: of two rows of 16 bits that follow each other in one, each expert's anew."""
    to = 0
    for g in range(bound_G.shape[0] - 1):
        for n in range(bound_G[g], bound_G[g + 1], 2):
            low, words = rows[n * width : (n + 1) * width], room[to : to + width]
            if n + 1 < bound_G[g + 1]:
                _pair(low, rows[(n + 1) * width : (n + 2) * width], words)
            else:
                _copy(low, words)
            to += width


@kernel(exact=True)
def panel(a, at_a, stride_a, next_a, rows, room, at_room, words, out, to, outs, b, at_next, stride_b, count, line):
    """COLUMNS columns of all rows; meanwhile those of b that begin at ``at_next`` are fetched, none where it is < 0."""
    if rows < ROWS:
        for m in range(rows):
            broad_tile_1(a, at_a + m * stride_a, stride_a, next_a, room, at_room, words, out, to + m * outs, outs)
        return
    tiles = (rows + ROWS - 1) // ROWS
    each, k = (count + tiles - 1) // tiles, 0
    for tile in range(tiles):
        if at_next >= 0:
            for k in range(tile * each, min(count, (tile + 1) * each)):
                for v in range(0, COLUMNS, line):
                    fetch(b, at_next + k * stride_b + v)
        m = min(tile * ROWS, rows - ROWS)  # the last tile may make rows again, to the same bits
        broad_tile(a, at_a + m * stride_a, stride_a, next_a, room, at_room, words, out, to + m * outs, outs)


@kernel(threaded=True, exact=True)
def broad_all(x, w, expert_G, bound_G, out, ins, outs, many, line, room, parts):
    """``broads`` as kernels call it: ``many`` numbers in a word, ``parts`` times the room for a panel of words."""
    panels, words = (outs + COLUMNS - 1) // COLUMNS, (ins + many - 1) // many
    for part in prange(parts):
        at_room = part * words * COLUMNS
        jobs = expert_G.shape[0] * panels
        for job in range(jobs * part // parts, jobs * (part + 1) // parts):
            g, column = job // panels, min(job % panels * COLUMNS, outs - COLUMNS)
            at, start = expert_G[g] * ins * outs, bound_G[g]
            lay(w, at + column, outs, ins, many, room, at_room)
            following = at + min(column + COLUMNS, outs - COLUMNS) if job % panels + 1 < panels else -1
            if following < 0 and g + 1 < expert_G.shape[0]:
                following = expert_G[g + 1] * ins * outs
            rows, to = bound_G[g + 1] - start, start * outs + column
            panel(x, start * ins, ins, many, rows, room, at_room, words, out, to, outs, w, following, outs, ins, line)


@kernel(threaded=True, exact=True)
def outer_all(left, right, expert_G, bound_G, grad, outs, ins, many, line, room, parts, most):
    """``outers`` as kernels call it: ``left`` in words, and at most ``most`` of them for an expert."""
    panels = (ins + COLUMNS - 1) // COLUMNS
    for part in prange(parts):
        at_room = part * most * COLUMNS
        jobs = expert_G.shape[0] * panels
        at_left, before = 0, 0
        for job in range(jobs * part // parts, jobs * (part + 1) // parts):
            g, column = job // panels, min(job % panels * COLUMNS, ins - COLUMNS)
            while before < g:
                at_left += (bound_G[before + 1] - bound_G[before] + many - 1) // many * outs
                before += 1
            count = bound_G[g + 1] - bound_G[g]
            words = (count + many - 1) // many
            lay(right, bound_G[g] * ins + column, ins, count, many, room, at_room)
            to = expert_G[g] * outs * ins + column
            panel(left, at_left, 1, outs, outs, room, at_room, words, grad, to, ins, right, -1, ins, count, line)
