"""Linear assignment: each row a column of its own, at the least total cost."""

import numpy as np

from turnout.errors import ShapeError, word
from turnout.solve.solution import Solution, checked_cost

__all__ = ["assignment"]


def assignment(cost_MN: np.ndarray, *, maximize: bool = False) -> Solution:
    """The columns, no two alike, that minimise sum_m cost[m, column_m], or maximise it.

    Args:
        cost_MN: (M, N), M <= N, finite.
        maximize: whether the entries are gains.

    Returns:
        The columns and the sum; exact.

    Raises:
        ShapeError: more rows than columns, or entries that are not finite.

    >>> assignment(np.array([[4.0, 1.0], [2.0, 0.0]])).column_M.tolist()
    [1, 0]

    Source: Kuhn, 1955, "The Hungarian Method for the Assignment Problem"; solved by scipy as Crouse, 2016, "On
    Implementing 2D Rectangular Assignment Algorithms".
    """
    from scipy.optimize import linear_sum_assignment

    cost_MN = checked_cost(cost_MN, "turnout.solve.assignment")
    if cost_MN.shape[0] > cost_MN.shape[1]:
        got, fix = f"{cost_MN.shape[0]} rows and {cost_MN.shape[1]} columns", "use transport, whose columns hold more"
        where = "turnout.solve.assignment"
        raise ShapeError(word("cost_MN", got=got, allowed="have a column for each row", where=where, fix=fix))
    row_M, column_M = linear_sum_assignment(cost_MN, maximize=maximize)
    return Solution(column_M.astype(np.int64), float(cost_MN[row_M, column_M].sum()))
