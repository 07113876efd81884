"""Products of rows in tiles of one size, so that no row's bits depend on how many rows there are or which they are."""

import torch
from torch import Tensor

__all__ = ["ROWS", "fixed_linear", "fixed_rows"]

# Rows of a tile: more are a waste for a single row, fewer for many (docs/log.md).
ROWS = 16
_known: dict[tuple[object, ...], int] = {}


def fixed_rows(weight_OI: Tensor) -> int:
    """How many rows a tile has for this matrix: ``ROWS`` where a row's bits are the same in each place, else 1.

    That is looked at, once for each shape, dtype and number of threads: a tile of equal rows must give equal rows.

    >>> fixed_rows(torch.ones(4, 8)) in (1, ROWS)
    True

    Source: none; a product in which every row meets the same operations.
    """
    shape, threads = (weight_OI.shape, weight_OI.stride()), torch.get_num_threads()
    key = (shape, weight_OI.dtype, weight_OI.device, threads)
    if key not in _known:
        generator = torch.Generator().manual_seed(0)
        row_1I = torch.randn(1, weight_OI.shape[1], generator=generator).to(weight_OI)
        out_NO = torch.mm(row_1I.repeat(ROWS, 1), weight_OI.t())
        _known[key] = ROWS if bool((out_NO == out_NO[:1]).all()) else 1
    return _known[key]


def fixed_linear(x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """(M, O) x W^T + b, computed so many rows at a time, always in the same memory; no gradients.

    Args:
        x_MI: the rows.
        weight_OI: in the same dtype.
        bias_O: (O,) or None.

    >>> fixed_linear(torch.ones(3, 2), torch.ones(4, 2))[2]
    tensor([2., 2., 2., 2.])

    Source: He, 2025, "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab).
    """
    (M, inner), outer, rows = x_MI.shape, weight_OI.shape[0], fixed_rows(weight_OI)
    tile_NI, made_NO = x_MI.new_zeros(rows, inner), x_MI.new_empty(rows, outer)
    out_MO = x_MI.new_empty(M, outer)
    for start in range(0, M, rows):
        some = min(rows, M - start)
        tile_NI[:some] = x_MI[start : start + some]
        torch.mm(tile_NI, weight_OI.t(), out=made_NO)
        out_MO[start : start + some] = made_NO[:some]
    return out_MO if bias_O is None else out_MO.add_(bias_O)
