"""Few rows against one matrix, stored (out, in): every number of the matrix is read once for all of them."""

import numpy as np
import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.run.compiled.engine import array, compiled_here, kernel, takes
from turnout.run.compiled.lanes import prange, wide

__all__ = ["MOST_ROWS", "rows_times", "suits_rows"]

MOST_ROWS = 64
_DTYPES = (torch.float32, torch.bfloat16)
# As many outputs as one thread makes at a time.
_CHUNK = 64


def suits_rows(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> bool:
    """Whether ``rows_times`` takes these here and now: few rows, one dtype, a CPU with numba, and no gradient asked.

    >>> suits_rows(torch.ones(1, 3), torch.ones(2, 3, device="meta"))
    False

    Source: none; plain bookkeeping.
    """
    tensors = (x_MI, weight_OI, bias_O)
    return (
        0 < x_MI.shape[0] <= MOST_ROWS
        and x_MI.dtype == weight_OI.dtype
        and x_MI.dtype in _DTYPES
        and weight_OI.stride(1) == 1
        and takes(*tensors)
        and not (torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in tensors))
        and compiled_here()
    )


def rows_times(
    x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None, *, out_MO: Tensor | None = None
) -> Tensor:
    """(M, O) rows times the transposed matrix, plus the bias: x W^T + b, summed in fp32. No gradients.

    Args:
        x_MI: (M, I), M from 1 to 64, any strides.
        weight_OI: (O, I) in x's dtype, each output's weights contiguous.
        bias_O: (O,) in any floating dtype.
        out_MO: (M, O) contiguous, in x's dtype, to be written to.

    Raises:
        ShapeError: the shapes do not fit, or M is more than 64.
        UsageError: a dtype or a memory layout that the kernel does not know.
        MissingExtraError: nothing can be compiled here.

    >>> x_MI, weight_OI = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
    >>> rows_times(x_MI, weight_OI) if compiled_here() else x_MI @ weight_OI.t()
    tensor([[1., 3., 6.]])

    Source: none; a matrix product in the order of memory.
    """
    rows, outs = _check(x_MI, weight_OI, bias_O, out_MO)
    wide_MI = x_MI.to(torch.float32).contiguous()
    direct = out_MO if out_MO is not None and out_MO.dtype == torch.float32 else None
    wide_MO = torch.empty(rows, outs) if direct is None else direct
    flat = weight_OI if weight_OI.is_contiguous() else weight_OI.as_strided((_span(weight_OI),), (1,))
    bias = torch.empty(0) if bias_O is None else bias_O.to(torch.float32).contiguous()
    _rows(array(wide_MI), array(flat).reshape(-1), weight_OI.stride(0), array(bias), array(wide_MO))
    if direct is not None or (x_MI.dtype == torch.float32 and out_MO is None):
        return wide_MO
    return wide_MO.to(x_MI.dtype) if out_MO is None else out_MO.copy_(wide_MO)


def _span(matrix: Tensor) -> int:
    """How many numbers of memory a matrix of contiguous rows reaches over."""
    return 0 if matrix.numel() == 0 else (matrix.shape[0] - 1) * matrix.stride(0) + matrix.shape[1]


def _check(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, out_MO: Tensor | None) -> tuple[int, int]:
    """M and O, if all fits.

    Raises:
        ShapeError: the shapes do not fit.
        UsageError: dtypes or layouts do not.
    """
    where = "turnout.run.compiled.rows_times"
    shapes = [None if one is None else tuple(one.shape) for one in (x_MI, weight_OI, bias_O, out_MO)]
    size = x_MI.shape[0], weight_OI.shape[0]
    fits = x_MI.ndim == weight_OI.ndim == 2 and size[0] <= MOST_ROWS and x_MI.shape[1] == weight_OI.shape[1]
    fits = fits and shapes[2] in (None, size[1:]) and shapes[3] in (None, size)
    if not fits:
        allowed = f"be (M, I) with M <= {MOST_ROWS}, (O, I), (O,) and (M, O)"
        fix = "use torch.nn.functional.linear for more rows"
        raise ShapeError(word("x, weight, bias and out", got=f"{shapes}", allowed=allowed, where=where, fix=fix))
    plain = (
        x_MI.dtype == weight_OI.dtype
        and x_MI.dtype in _DTYPES
        and (weight_OI.stride(1) == 1 or weight_OI.shape[1] <= 1)
        and (out_MO is None or (out_MO.dtype == x_MI.dtype and out_MO.is_contiguous()))
        and takes(x_MI, weight_OI, bias_O, out_MO)
    )
    if not plain:
        got = f"{x_MI.dtype} and {weight_OI.dtype} on {weight_OI.device}, strides {weight_OI.stride()}"
        allowed = f"be plain CPU tensors of one dtype of {_DTYPES}, each output's weights contiguous, out contiguous"
        fix = "ask suits_rows first, and use torch.nn.functional.linear where it says no"
        raise UsageError(word("x, weight and out", got=got, allowed=allowed, where=where, fix=fix))
    return size


@kernel()
def _four(x_MI, m, row_I):
    """The sums of four rows with one row of the matrix."""
    a, b, c, d = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    x0, x1, x2, x3 = x_MI[m], x_MI[m + 1], x_MI[m + 2], x_MI[m + 3]
    for i in range(row_I.shape[0]):
        w = wide(row_I[i])
        a += w * x0[i]
        b += w * x1[i]
        c += w * x2[i]
        d += w * x3[i]
    return a, b, c, d


@kernel()
def _two(x_MI, m, row_I):
    a, b = np.float32(0), np.float32(0)
    x0, x1 = x_MI[m], x_MI[m + 1]
    for i in range(row_I.shape[0]):
        w = wide(row_I[i])
        a += w * x0[i]
        b += w * x1[i]
    return a, b


@kernel()
def _one(x_MI, m, row_I):
    a = np.float32(0)
    x0 = x_MI[m]
    for i in range(row_I.shape[0]):
        a += wide(row_I[i]) * x0[i]
    return a


@kernel(threaded=True)
def _rows(x_MI, weight, stride, bias_O, out_MO):
    """out[m, o] = bias[o] + sum over i of x[m, i] weight[o stride + i]; an empty bias is none."""
    rows, outs = out_MO.shape
    for chunk in prange((outs + _CHUNK - 1) // _CHUNK):
        for o in range(chunk * _CHUNK, min(outs, (chunk + 1) * _CHUNK)):
            row_I = weight[o * stride : o * stride + x_MI.shape[1]]
            b = bias_O[o] if bias_O.shape[0] else np.float32(0)
            m = 0
            while m + 4 <= rows:
                s0, s1, s2, s3 = _four(x_MI, m, row_I)
                out_MO[m, o], out_MO[m + 1, o], out_MO[m + 2, o], out_MO[m + 3, o] = s0 + b, s1 + b, s2 + b, s3 + b
                m += 4
            if m + 2 <= rows:
                s0, s1 = _two(x_MI, m, row_I)
                out_MO[m, o], out_MO[m + 1, o] = s0 + b, s1 + b
                m += 2
            if m < rows:
                out_MO[m, o] = _one(x_MI, m, row_I) + b
