"""Few rows against one matrix, stored (out, in): every number of the matrix is read once for all of them."""

import numpy as np
import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.run.compiled.engine import array, compiled_here, kernel, takes
from turnout.run.compiled.formats import blocks, knows, matrices, meets_short
from turnout.run.compiled.lanes import prange, wide
from turnout.run.compiled.order import lay_row, order
from turnout.run.compiled.span import span
from turnout.types.packed import Packed

__all__ = ["MOST_ROWS", "rows_times", "suits_rows"]

MOST_ROWS = 64
# As many outputs as one thread makes at a time.
_CHUNK = 64
_NONE = np.zeros(0, np.float32)


def suits_rows(x_MI: Tensor, weight_OI: Tensor | Packed, bias_O: Tensor | None = None) -> bool:
    """Whether ``rows_times`` takes these here and now: few rows, one dtype, a CPU with numba, and no gradient asked.

    >>> suits_rows(torch.ones(1, 3), torch.ones(2, 3, device="meta"))
    False

    Source: none; plain bookkeeping.
    """
    tensors = [one for one in (x_MI, weight_OI, bias_O) if isinstance(one, Tensor)]
    return (
        0 < x_MI.shape[0] <= MOST_ROWS
        and compiled_here()
        and takes(x_MI, bias_O)
        and knows(weight_OI, x_MI.dtype)
        and (bias_O is None or bias_O.dtype in (torch.float32, x_MI.dtype))
        and not (torch.is_grad_enabled() and any(one.requires_grad for one in tensors))
    )


def rows_times(
    x_MI: Tensor, weight_OI: Tensor | Packed, bias_O: Tensor | None = None, *, out_MO: Tensor | None = None
) -> Tensor:
    """(M, O) rows times the transposed matrix, plus the bias: x W^T + b, summed in fp32. No gradients.

    Args:
        x_MI: (M, I) fp32, bf16 or fp16, M from 1 to 64, any strides.
        weight_OI: (O, I) in x's dtype with each output's weights contiguous, or in few bits.
        bias_O: (O,) fp32, or in x's dtype.
        out_MO: (M, O) contiguous, in x's dtype, to be written to.

    Raises:
        ShapeError: the shapes do not fit, or M is more than 64.
        UsageError: a dtype or a memory layout that the kernel does not know; ``suits_rows`` says.
        MissingExtraError: nothing can be compiled here.

    >>> x_MI, weight_OI = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    >>> rows_times(x_MI, weight_OI) if compiled_here() else x_MI @ weight_OI.t()
    tensor([[1., 3., 6.]])

    Source: none; a matrix product in the order of memory.
    """
    shape = _check(x_MI, weight_OI, bias_O, out_MO)
    direct = out_MO if out_MO is not None and out_MO.dtype == torch.float32 else None
    wide_MO = x_MI.new_empty(shape, dtype=torch.float32) if direct is None else direct
    bias = _NONE if bias_O is None else array(bias_O.contiguous())
    room = x_MI.new_empty(shape[0] * blocks(x_MI.shape[1]), dtype=torch.float32)
    room = array(room.view(torch.bfloat16) if meets_short(weight_OI, x_MI.dtype) else room)
    x, out = array(x_MI.contiguous()).reshape(-1), array(wide_MO).reshape(-1)
    _rows(x, matrices(weight_OI).told, bias, room, out, *x_MI.shape, shape[1])
    if direct is not None or (x_MI.dtype == torch.float32 and out_MO is None):
        return wide_MO
    return wide_MO.to(x_MI.dtype) if out_MO is None else out_MO.copy_(wide_MO)


def _check(x_MI: Tensor, weight_OI: Tensor | Packed, bias_O: Tensor | None, out_MO: Tensor | None) -> tuple[int, int]:
    """M and O, if all fits.

    Raises:
        ShapeError: the shapes do not fit.
        UsageError: dtypes or layouts do not.
    """
    where = "turnout.run.compiled.rows_times"
    shapes = [None if one is None else tuple(one.shape) for one in (x_MI, weight_OI, bias_O, out_MO)]
    size = x_MI.shape[0], weight_OI.shape[0]
    fits = x_MI.ndim == len(weight_OI.shape) == 2 and size[0] <= MOST_ROWS and x_MI.shape[1] == weight_OI.shape[1]
    fits = fits and shapes[2] in (None, size[1:]) and shapes[3] in (None, size)
    if not fits:
        allowed = f"be (M, I) with M <= {MOST_ROWS}, (O, I), (O,) and (M, O)"
        fix = "use torch.nn.functional.linear for more rows"
        raise ShapeError(word("x, weight, bias and out", got=f"{shapes}", allowed=allowed, where=where, fix=fix))
    biased = bias_O is None or (takes(bias_O) and bias_O.dtype in (torch.float32, x_MI.dtype))
    written = out_MO is None or (takes(out_MO) and out_MO.dtype == x_MI.dtype and out_MO.is_contiguous())
    if not (biased and written and takes(x_MI) and knows(weight_OI, x_MI.dtype)):
        got = f"{x_MI.dtype} on {x_MI.device} and {weight_OI!r}"[:200]
        got = got if isinstance(weight_OI, Packed) else f"{x_MI.dtype}, {weight_OI.dtype} on {weight_OI.device}"
        got = got if isinstance(weight_OI, Packed) else f"{got}, strides {weight_OI.stride()}"
        allowed = "be plain CPU tensors of one dtype, fp32, bf16 or fp16, each output's weights contiguous, or packed"
        fix = "ask suits_rows first, and use torch.nn.functional.linear where it says no"
        raise UsageError(word("x, weight, bias and out", got=got, allowed=allowed, where=where, fix=fix))
    return size


@kernel(threaded=True, exact=True)
def _rows(x, weights, bias_O, wide_x, out, rows, ins, outs):
    """out[m, o] = bias[o] + sum over i of x[m, i] w[o, i]; an empty bias is none. wide_x is room."""
    size = wide_x.shape[0] // max(1, rows)
    for m in range(rows):
        row = wide_x[m * size : (m + 1) * size]
        lay_row(x[m * ins : (m + 1) * ins], row, order(weights[0], wide_x))
    for chunk in prange((outs + _CHUNK - 1) // _CHUNK):
        first, last = chunk * _CHUNK, min(outs, (chunk + 1) * _CHUNK)
        span(weights, 0, 0, wide_x, 0, size, rows, out, 0, outs, first, last)
        if bias_O.shape[0]:
            for m in range(rows):
                for o in range(first, last):
                    out[m * outs + o] += wide(bias_O[o])
