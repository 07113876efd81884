"""Many rows against matrices in few bits: some outputs' weights at a time are written out where the cache holds them.

What comes out has the bits of ``turnout.run.compiled.dots`` over the weights written out, which are never there as a
whole: 64 outputs at most for each thread. Scales could be applied to sums instead, which would leave out a rounding of
bfloat16's; with groups of 32 that is one more product for each, and twice the time.
"""

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.dot_tile import OUTS
from turnout.run.compiled.dots import able, rows_at_once, with_outputs
from turnout.run.compiled.engine import array, compiled_here, kernel, takes, threads
from turnout.run.compiled.fetch import LINE
from turnout.run.compiled.formats import knows, matrices
from turnout.run.compiled.lanes import BLOCK, features, prange
from turnout.run.compiled.unpack import unpack
from turnout.types.packed import Packed

__all__ = ["panel_products", "suits_panels"]

# The most outputs that are written out at once, and bytes of them: in a processor's second cache, beside the rows.
_CHUNK, _PANEL = 64, 1 << 18


def suits_panels(row_NI: Tensor, stack: Packed) -> bool:
    """Whether ``panel_products`` takes these, here and now: as ``suits_dots``, in whole blocks of codes.

    >>> matrix = Packed.of(torch.ones(1, 4, 16, dtype=torch.int8), torch.ones(1, 4, 1), group=16, bits=8)
    >>> suits_panels(torch.ones(4, 16), matrix)
    False

    Source: none; plain bookkeeping.
    """
    outs, ins = stack.shape[-2:]
    return (
        not ins % BLOCK
        and not outs % OUTS
        and compiled_here()
        and takes(row_NI)
        and able(row_NI.dtype)
        and knows(stack, row_NI.dtype)
        and "avx512bw" in features()
    )


def panel_products(row_NI: Tensor, stack: Packed, expert_G: list[int], bound_G: list[int], out_NO: Tensor) -> None:
    """Each expert's rows times its transposed matrix, summed in fp32; bits as those of ``turnout.run.compiled.dots``.

    Args:
        row_NI: the rows of some experts, one expert's after the other's; as ``suits_panels`` asks.
        stack: the matrices of all experts, (E, O, I), or (O, I) of one.
        expert_G: which experts.
        bound_G: where each one's rows begin and the last one's end, one more than experts; counted from the first.
        out_NO: what is written to, contiguous, in the rows' dtype.

    >>> matrix = Packed.of(torch.ones(4, 32, dtype=torch.int8), torch.ones(4, 1), group=32, bits=8)
    >>> rows, out = torch.ones(1, 32), torch.empty(1, 4)
    >>> _ = panel_products(rows, matrix, [0], [0, 1], out) if suits_panels(rows, matrix) else out.fill_(32)
    >>> out.tolist()
    [[32.0, 32.0, 32.0, 32.0]]

    Source: none; panels as Goto & van de Geijn, 2008, "Anatomy of High-Performance Matrix Multiplication", packs them.
    """
    (outs, ins), size = stack.shape[-2:], row_NI.element_size()
    parts, chunk = threads(), max(OUTS, min(_CHUNK, _PANEL // (ins * size) // OUTS * OUTS))
    room = array(torch.empty(parts * chunk * ins, dtype=row_NI.dtype, device="cpu"))
    bound, some = np.array(bound_G) - bound_G[0], rows_at_once(ins * size)
    given = (
        array(row_NI.contiguous()).reshape(-1),
        matrices(stack).told,
        np.array(expert_G),
        bound,
        array(out_NO).reshape(-1),
    )
    _panels(*given, ins, outs, some, room, chunk, parts)


@kernel(threaded=True, exact=True)
def _panels(x, weights, expert_G, bound_G, out, ins, outs, some, room, chunk, parts):
    code, scale, levels, stride_expert, stride_out, groups, group = weights
    jobs = expert_G.shape[0] * ((outs + chunk - 1) // chunk)
    for part in prange(parts):
        for job in range(jobs * part // parts, jobs * (part + 1) // parts):
            g, begin = job // (jobs // expert_G.shape[0]), job % (jobs // expert_G.shape[0]) * chunk
            start, at_scale = expert_G[g] * stride_expert, expert_G[g] * outs * groups
            for first in range(bound_G[g], bound_G[g + 1], some):
                last = min(first + some, bound_G[g + 1])
                for o in range(begin, min(begin + chunk, outs), OUTS):
                    at, lines = (part * chunk + o - begin) * ins, 0
                    if first == bound_G[g]:
                        lines = (OUTS * stride_out + LINE - 1) // LINE
                        for i in range(o, o + OUTS):
                            to = at + (i - o) * ins
                            unpack(
                                code,
                                start + i * stride_out,
                                scale,
                                at_scale + i * groups,
                                groups,
                                group,
                                levels,
                                room,
                                to,
                            )
                    then = start + (o + OUTS) * stride_out
                    with_outputs(x, first, last, room, at, out, o, ins, outs, code, then, lines, LINE)
