"""Some rows against some outputs of one matrix: the tiles of ``turnout.run.compiled.tile``, one after the other."""

from turnout.run.compiled.engine import kernel
from turnout.run.compiled.lanes import LANES
from turnout.run.compiled.tile import OUTS
from turnout.run.compiled.tiles import tile_1, tile_2, tile_4, tile_8

__all__ = ["span", "span_before"]


# Bytes that are fetched ahead at least, of codes and of other numbers: what memory gives while one line comes.
_FEW_AHEAD, _AHEAD = 4096, 8192


@kernel(exact=True)
def span_before(weights, at, at_scale, x, of, ins, rows, out, to, far, first, last, then):
    """As ``span``; what is read next, and so fetched meanwhile, begins at ``code[then]``."""
    code, scale, levels, _, stride, groups, group = weights
    tile = max(1, OUTS * stride * code.itemsize)
    ahead = ((_FEW_AHEAD if code.itemsize == 1 else _AHEAD) + tile - 1) // tile * OUTS
    for o in range(first, last, OUTS):
        here, there, outs = at + o * stride, at_scale + o * groups, min(OUTS, last - o)
        row, into, left = of, to + o, rows
        after = at + (o + ahead) * stride if o + ahead < last else then + (o + ahead - last) * stride
        while left >= 8 and LANES == 16:  # fewer registers hold the sums of four rows at most
            tile_8(code, here, stride, scale, there, groups, group, levels, x, row, ins, out, into, far, outs, after)
            row, into, left = row + 8 * ins, into + 8 * far, left - 8
        while left >= 4:
            tile_4(code, here, stride, scale, there, groups, group, levels, x, row, ins, out, into, far, outs, after)
            row, into, left = row + 4 * ins, into + 4 * far, left - 4
        if left >= 2:
            tile_2(code, here, stride, scale, there, groups, group, levels, x, row, ins, out, into, far, outs, after)
            row, into, left = row + 2 * ins, into + 2 * far, left - 2
        if left:
            tile_1(code, here, stride, scale, there, groups, group, levels, x, row, ins, out, into, far, outs, after)


@kernel(exact=True)
def span(weights, at, at_scale, x, of, ins, rows, out, to, far, first, last):
    """out[to + m far + o] = sum over i of x[of + m ins + i] w[o, i] for m in [0, rows) and o in [first, last).

    Of the stack ``weights`` the matrix begins at ``code[at]``, its scales at ``scale[at_scale]``. x is laid out
    (``turnout.run.compiled.order``), in fp32 or in bfloat16.
    """
    then = at + last * weights[4]
    span_before(weights, at, at_scale, x, of, ins, rows, out, to, far, first, last, then)
