"""Solution: for each row the column that it was given, and what that is worth."""

import dataclasses

import numpy as np

from turnout.errors import ShapeError, word

__all__ = ["Solution", "checked_cost"]


@dataclasses.dataclass(frozen=True, eq=False)
class Solution:
    """What a solver found: one column for each row.

    Args:
        column_M: (M,) int64, the column of each row.
        value: the sum of the chosen entries.

    >>> Solution(np.array([1, 0]), 3.0).value
    3.0

    Source: none; plain bookkeeping.
    """

    column_M: np.ndarray
    value: float


def checked_cost(cost_MN: np.ndarray, where: str) -> np.ndarray:
    """The table in fp64.

    Raises:
        ShapeError: not a finite table of two axes.
    """
    cost_MN = np.asarray(cost_MN, dtype=np.float64)
    if cost_MN.ndim != 2 or not np.isfinite(cost_MN).all():
        got = f"shape {cost_MN.shape}" if cost_MN.ndim != 2 else "entries that are not finite"
        fix = "give forbidden pairs a large finite cost"
        raise ShapeError(word("cost_MN", got=got, allowed="be a finite table (M, N)", where=where, fix=fix))
    return cost_MN
