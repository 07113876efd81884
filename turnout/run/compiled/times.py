"""Rows against a matrix that a table describes, whatever its numbers and its order in memory.

For each format there is a kernel, whose address stands in the table: a step is compiled once, and calls what it finds.
"""

import functools
import importlib
from typing import Any

import numpy as np

from turnout.run.compiled.engine import Kernel, Lazy, kernel
from turnout.run.compiled.lanes import ROOM, prange, wide
from turnout.run.compiled.order import close_at, lay_out_at, order
from turnout.run.compiled.span import span
from turnout.run.compiled.tables import (
    AT,
    BIAS,
    BIAS_NEXT,
    COLUMNS,
    GROUP,
    GROUPS,
    INS,
    KERNEL,
    LEVELS,
    NEXT,
    ORDER,
    OUTS,
    SCALE,
    SCALE_NEXT,
    STRIDE,
    begins,
    brains,
    floats,
    view,
    wholes,
)

__all__ = ["address", "blocks_of", "called", "laid_out", "met", "order_of", "share", "spread", "times"]

# As many inputs as stay in the processor's cache until all rows have met them.
_BLOCK = 16
# What a kernel is told in whole numbers after the two pointers that have a type: see ``by_output``.
_NUMBERS = 9


@kernel(exact=True)
def _biased(row, e, rows, out, outs, first, last):
    """Adds the bias of the e-th matrix of a stack."""
    if row[BIAS] != 0:
        bias_O = floats(row[BIAS] + e * row[BIAS_NEXT] * 4, row[OUTS])
        for m in range(rows):
            for o in range(first, last):
                out[m * outs + o] += bias_O[o]


@kernel(exact=True)
def by_output(code, scale, at_row, e, ins, x, size, rows, out, outs, first, last):
    """out[m outs + o] = sum over i of x[m size + i] w_e[o, i], plus a bias: each output's weights after each other.

    Of a stack that the row at ``at_row`` of a table describes, for m in [0, rows) and o in [first, last). x, laid out,
    and out are addresses.
    """
    row = wholes(at_row, COLUMNS)
    codes, scales = view(code, (row[OUTS] - 1) * row[STRIDE] + 1), view(scale, row[OUTS] * row[GROUPS])
    weights = codes, scales, floats(row[LEVELS], 16), row[NEXT], row[STRIDE], row[GROUPS], row[GROUP]
    x_F, out_F = floats(x, rows * size), floats(out, rows * outs)
    span(weights, e * row[NEXT], e * row[SCALE_NEXT], x_F, 0, size, rows, out_F, 0, outs, first, last)
    _biased(row, e, rows, out_F, outs, first, last)
    return 0


@kernel(exact=True)
def by_output_short(code, scale, at_row, e, ins, x, size, rows, out, outs, first, last):
    """The same for rows that are laid out in bfloat16, in the memory of fp32 ones."""
    row = wholes(at_row, COLUMNS)
    codes, scales = view(code, (row[OUTS] - 1) * row[STRIDE] + 1), view(scale, row[OUTS] * row[GROUPS])
    weights = codes, scales, floats(row[LEVELS], 16), row[NEXT], row[STRIDE], row[GROUPS], row[GROUP]
    x_F, out_F = brains(x, 2 * rows * size), floats(out, rows * outs)
    span(weights, e * row[NEXT], e * row[SCALE_NEXT], x_F, 0, 2 * size, rows, out_F, 0, outs, first, last)
    _biased(row, e, rows, out_F, outs, first, last)
    return 0


@kernel()
def _four(weight, stride, x_4, out_O):
    """Adds what four inputs make, so that each sum is read and written once for all of them."""
    a, b, c, d = x_4[0], x_4[1], x_4[2], x_4[3]
    second, third, fourth = weight[stride:], weight[2 * stride :], weight[3 * stride :]
    for o in range(out_O.shape[0]):
        out_O[o] += (a * wide(weight[o]) + b * wide(second[o])) + (c * wide(third[o]) + d * wide(fourth[o]))


@kernel()
def onto_by_input(code, scale, at_row, e, ins, x, size, rows, out, outs, first, last):
    """Adds to out what is there, of matrices whose inputs' weights lie after each other; the first ``ins`` count.

    Sums are taken in blocks of inputs: those of some inputs and then of others are the same as those of all, where the
    first are whole blocks.
    """
    row = wholes(at_row, COLUMNS)
    stride, start = row[STRIDE], e * row[NEXT]
    weight = view(code, start + (ins - 1) * stride + row[OUTS])[start:]
    x_F, out_F = floats(x, rows * size), floats(out, rows * outs)
    for begin in range(0, ins, _BLOCK):
        end = min(ins, begin + _BLOCK)
        for m in range(rows):
            out_O, i = out_F[m * outs + first : m * outs + last], begin
            while i + 4 <= end:
                _four(weight[i * stride + first :], stride, x_F[m * size + i : m * size + i + 4], out_O)
                i += 4
            while i < end:
                a, row_O = x_F[m * size + i], weight[i * stride + first :]
                for o in range(out_O.shape[0]):
                    out_O[o] += a * wide(row_O[o])
                i += 1
    _biased(row, e, rows, out_F, outs, first, last)
    return 0


@kernel()
def by_input(code, scale, at_row, e, ins, x, size, rows, out, outs, first, last):
    """The same where each input's weights lie after each other, of the first ``ins`` inputs."""
    out_F = floats(out, rows * outs)
    for m in range(rows):
        for o in range(first, last):
            out_F[m * outs + o] = np.float32(0)
    return onto_by_input(code, scale, at_row, e, ins, x, size, rows, out, outs, first, last)


@kernel()
def by_input_packed(code, scale, at_row, e, ins, x, size, rows, out, outs, first, last):
    """The same of weights in few bits, where a group is of outputs."""
    row = wholes(at_row, COLUMNS)
    stride, groups, group, levels = row[STRIDE], row[GROUPS], row[GROUP], floats(row[LEVELS], 16)
    codes = view(code, (e + 1) * row[NEXT] + ins * stride)[e * row[NEXT] :]
    scales = view(scale, (e + 1) * row[SCALE_NEXT] + ins * groups)[e * row[SCALE_NEXT] :]
    x_F, out_F, halved, weight_O = (
        floats(x, rows * size),
        floats(out, rows * outs),
        stride < row[OUTS],
        np.empty(last, np.float32),
    )
    for m in range(rows):
        for o in range(first, last):
            out_F[m * outs + o] = np.float32(0)
    for i in range(ins):
        for o in range(first, last):
            if halved:
                value = levels[(codes[i * stride + o // 2] >> (4 * (o & 1))) & 15]
            else:
                value = wide(codes[i * stride + o])
            weight_O[o] = value * wide(scales[i * groups + o // group])
        for m in range(rows):
            a, out_O = x_F[m * size + i], out_F[m * outs : m * outs + last]
            for o in range(first, last):
                out_O[o] += a * weight_O[o]
    _biased(row, e, rows, out_F, outs, first, last)
    return 0


def address(code: np.dtype, scale: np.dtype, *, by_input: bool, short: bool = False, onto: bool = False) -> int:
    """Where the kernel of a format is, compiled if it has not been; as ``engine.array`` shows codes and scales.

    Args:
        code: of numbers or codes.
        scale: of their scales.
        by_input: whether each input's weights lie after each other, rather than each output's.
        short: whether rows meet them in bfloat16 (``turnout.run.compiled.formats.meets_short``).
        onto: whether what comes out is added to what is there; of plain numbers by input alone.
    """
    if onto:
        return _address(_ONTO_BY_INPUT, code, scale)
    if by_input:
        return _address(_BY_INPUT_PACKED if code in (np.int8, np.uint8) else _BY_INPUT, code, scale)
    return _address(_BY_OUTPUT_SHORT if short else _BY_OUTPUT, code, scale)


@functools.cache
def _address(of: Kernel, code: np.dtype, scale: np.dtype) -> int:
    numba = importlib.import_module("numba")
    types, known = numba.types, numba.np.numpy_support.from_dtype
    kinds = (*(types.CPointer(known(each)) for each in (code, scale)), *[types.int64] * (_NUMBERS + 1))
    made = of.made()
    made.compile(kinds)
    found = made.overloads[kinds]
    return found.library.get_pointer_to_function(found.fndesc.llvm_cfunc_wrapper_name)


_BY_OUTPUT, _BY_OUTPUT_SHORT, _BY_INPUT, _BY_INPUT_PACKED = by_output, by_output_short, by_input, by_input_packed
_ONTO_BY_INPUT = onto_by_input


@kernel(exact=True)
def _order(code, room):
    return order(code, room)


@functools.cache
def order_of(code: np.dtype, *, short: bool = False) -> int:
    """How rows that meet codes like these are laid out (``turnout.run.compiled.order``)."""
    return int(_order(np.zeros(0, code), np.zeros(0, np.uint16 if short else np.float32)))


def _calls() -> Any:
    types = importlib.import_module("numba").types
    ir = importlib.import_module("numba.core.cgutils").ir  # llvmlite's, as numba itself has it

    @importlib.import_module("numba.extending").intrinsic
    def calls(context: Any, address: Any, told: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            word, counted = ir.IntType(64), list(enumerate(told.types))
            kind = ir.FunctionType(word, [word] * len(counted)).as_pointer()
            each = [builder.extract_value(given[1], place) for place, _ in counted]
            each = [context.cast(builder, one, its, types.int64) for one, (_, its) in zip(each, counted, strict=True)]
            return builder.call(builder.inttoptr(given[0], kind), each)

        return types.int64(types.int64, told), lower

    return calls


# calls(address, told): what the function at this address, which takes and gives whole numbers, makes of them.
called: Any = Lazy(_calls)


@kernel()
def met(table, which, e, ins, x, size, rows, out, outs, first, last):
    """What the kernel of a matrix makes of so many inputs of rows: ``by_output`` says what it is told."""
    at = begins(table) + which * (COLUMNS * 8)
    told = table[which, AT], table[which, SCALE], at, e, ins, x, size, rows, out, outs, first, last
    called(table[which, KERNEL], told)


@kernel()
def times(table, which, e, x_MI, out_MO, first, last):
    """Out = x, laid out, times the e-th matrix of a stack, plus its bias, from one output to another.

    Of a stack by inputs those count that x has. Rows of x and out may lie apart.
    """
    x, out = (begins(x_MI), x_MI.strides[0] // 4, x_MI.shape[0]), (begins(out_MO), out_MO.strides[0] // 4)
    met(table, which, e, min(table[which, INS], x_MI.shape[1]), *x, *out, first, last)


@kernel()
def share(count, part, parts):
    """Where one of some equal parts begins; borders of vectors where there are enough."""
    if part == parts:
        return count
    return count * part // parts // 16 * 16


@kernel()
def blocks_of(ins):
    """As ``turnout.run.compiled.formats.blocks``: the room for a row of so many numbers."""
    return (ins + ROOM - 1) // ROOM * ROOM


@kernel()
def laid_out(table, which, x_MI, room_F):
    """(M, blocks of I) the rows as this matrix takes them, in the room."""
    rows, ins = x_MI.shape
    size = blocks_of(ins)
    for m in range(rows):
        row_F = room_F[m * size : (m + 1) * size]
        lay_out_at(x_MI[m], 0, row_F, table[which, ORDER])
        close_at(row_F, ins, table[which, ORDER])
    return room_F[: rows * size].reshape(rows, size)


@kernel(threaded=True)
def spread(table, which, x_MI, room_F, out_MO, parts):
    """Out = x times a matrix, plus its bias; each thread makes a part of the outputs."""
    outs, wide_MI = table[which, OUTS], laid_out(table, which, x_MI, room_F)
    for part in prange(parts):
        times(table, which, 0, wide_MI, out_MO, share(outs, part, parts), share(outs, part + 1, parts))
