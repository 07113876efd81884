"""Some rows against some outputs of one matrix: the tiles of ``turnout.run.compiled.tile``, one after the other."""

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import LANES, wide
from turnout.run.compiled.tile import tile_1, tile_1x4, tile_2, tile_4, tile_8

__all__ = ["lay_out", "place", "span"]

# What rows are filled up to: a block of the widest vectors.
_BLOCK = 32


@kernel(exact=True)
def place(i, split):
    """Where number i of a row stands when it is laid out."""
    if not split:
        return i
    inside = i % (2 * LANES)
    return i - inside + (inside & 1) * LANES + (inside >> 1)


@kernel(exact=True)
def lay_out(x, of, ins, wide_x, to, split):
    """Writes the row x[of : of + ins] as float32, even places of every block before odd ones where the format wants it.

    It begins at ``wide_x[to]``, is as long as whole blocks are, and ends with zeros.
    """
    for i in range(ins, (ins + _BLOCK - 1) // _BLOCK * _BLOCK):
        wide_x[to + place(i, split)] = 0
    for i in range(ins):
        wide_x[to + place(i, split)] = wide(x[of + i])


@kernel(exact=True)
def span(weights, at, at_scale, x, of, ins, rows, out, to, outs, first, last):
    """out[to + m outs + o] = sum over i of x[of + m ins + i] w[o, i] for m in [0, rows) and o in [first, last).

    Of the stack ``weights`` the matrix begins at ``code[at]``, its scales at ``scale[at_scale]``. x is as ``lay_out``
    makes it.
    """
    code, scale, levels, _, stride, groups, group = weights
    o, to = first, to + first
    while rows == 1 and o + 4 <= last:
        here, there = at + o * stride, at_scale + o * groups
        tile_1x4(code, here, stride, scale, there, groups, group, levels, x, of, ins, out, to, outs)
        o, to = o + 4, to + 4
    while o < last:
        here, there, row, into, left = at + o * stride, at_scale + o * groups, of, to, rows
        while left >= 8:
            tile_8(code, here, stride, scale, there, groups, group, levels, x, row, ins, out, into, outs)
            row, into, left = row + 8 * ins, into + 8 * outs, left - 8
        if left >= 4:
            tile_4(code, here, stride, scale, there, groups, group, levels, x, row, ins, out, into, outs)
            row, into, left = row + 4 * ins, into + 4 * outs, left - 4
        if left >= 2:
            tile_2(code, here, stride, scale, there, groups, group, levels, x, row, ins, out, into, outs)
            row, into, left = row + 2 * ins, into + 2 * outs, left - 2
        if left:
            tile_1(code, here, stride, scale, there, groups, group, levels, x, row, ins, out, into, outs)
        o, to = o + 1, to + 1
