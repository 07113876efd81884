"""Rows added to the tokens that they belong to, while they are still in the cache; compiled."""

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.engine import array, compiled_here, kernel, takes, threads
from turnout.run.compiled.lanes import prange, wide

__all__ = ["add_all", "add_rows", "columns", "suits_sums"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Columns that a thread takes at least.
_LEAST = 64


def suits_sums(row_ND: Tensor) -> bool:
    """Whether ``add_rows`` takes rows like these, here and now.

    >>> suits_sums(torch.ones(2, 2, dtype=torch.float64))
    False

    Source: none; plain bookkeeping.
    """
    return row_ND.dtype in _DTYPES and takes(row_ND) and compiled_here()


def add_rows(
    row_ND: Tensor,
    token_M: Tensor,
    into_TD: Tensor,
    *,
    place_M: Tensor | None = None,
    first: int = 0,
    weight_M: Tensor | None = None,
) -> None:
    """Adds rows to the rows of ``into_TD`` that they belong to, one after the other, in fp32.

    Every thread takes columns of its own, so sums are made in the same order by however many.

    Args:
        row_ND: the rows.
        token_M: (M,) where each goes.
        into_TD: (T, D) fp32, contiguous.
        place_M: (M,) which of the rows, counted from ``first``; None for the first M.
        weight_M: (M,) fp32, what each is multiplied with; None for 1.

    >>> into = torch.zeros(2, 1)
    >>> add_rows(torch.tensor([[2.0], [3.0]]), torch.tensor([1, 1]), into) if compiled_here() else into[1].add_(5)
    ...
    >>> into.tolist()
    [[0.0], [5.0]]

    Source: none; a scatter of sums.
    """
    place = token_M.new_empty(0) if place_M is None else place_M
    weight = into_TD.new_empty(0) if weight_M is None else weight_M
    add_all(array(row_ND), array(token_M), array(place), array(weight), array(into_TD), first, columns(row_ND.shape[1]))


def columns(width: int) -> int:
    """How many of so many columns one thread takes.

    >>> columns(64)
    64

    Source: none; plain bookkeeping.
    """
    return max(_LEAST, -(-width // threads()))


@kernel()
def _add_row(row_D, w, into_D):
    for d in range(row_D.shape[0]):
        into_D[d] += w * wide(row_D[d])


@kernel(threaded=True)
def add_all(row_ND, token_M, place_M, weight_M, into_TD, first_row, columns):
    """``add_rows`` as kernels call it; without places or weights those are empty."""
    width = row_ND.shape[1]
    for part in prange((width + columns - 1) // columns):
        first, end = part * columns, min(width, (part + 1) * columns)
        for m in range(token_M.shape[0]):
            n = place_M[m] - first_row if place_M.shape[0] else m
            w = wide(weight_M[m]) if weight_M.shape[0] else np.float32(1)
            _add_row(row_ND[n, first:end], w, into_TD[token_M[m], first:end])
