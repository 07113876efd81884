"""How much of a table of weights can lie inside groups at most, whatever the groups: a bound that anyone can check."""

import numpy as np

__all__ = ["kept_bound"]

_ROUNDS = 6
_LEAST = 6  # experts a group from which on the second bound is ever the lower one: 40 times the work of the first


def kept_bound(step_EF: np.ndarray, groups: int, left: int, right: int, *, single: bool = True) -> float:
    """An upper bound on sum_g sum_(e in g, f in g) step[e, f], if a group holds ``left`` rows and ``right`` columns.

    The least of two bounds. (1) A row meets at most ``right`` columns and a column ``left`` rows: for all u, v >= 0,
    right sum_e u_e + left sum_f v_f + sum_ef max(0, step_ef - u_e - v_f) is not below it; u and v are improved in
    turn. (2) With equal groups, sum(step) / G + sqrt(left right) sum of the largest G - 1 singular values of the table
    with its row and column means taken out.

    Args:
        step_EF: not negative.
        groups: G.
        left: the most rows of a group.
        right: the most columns of a group.
        single: whether each row and each column is in one group only, and all groups are full; (2) needs it.

    Returns:
        The bound; never above the sum.

    >>> kept_bound(np.array([[3.0, 1.0], [1.0, 3.0]]), 2, 1, 1)
    6.0

    Source: (1) linear programming duality of the b-matching. (2) Donath & Hoffman, 1973, "Lower bounds for the
    partitioning of graphs", on two sides, by von Neumann's inequality for the trace.
    """
    total = float(step_EF.sum())
    bound = min(total, _degrees(step_EF, left, right))
    rows, columns = step_EF.shape
    full = (left * groups, right * groups) == (rows, columns)
    if single and full and groups > 1 and np.sqrt(left * right) >= _LEAST:
        centred_EF = step_EF - step_EF.mean(0) - step_EF.mean(1, keepdims=True) + step_EF.mean()
        bound = min(bound, total / groups + float(np.sqrt(left * right) * _singular(centred_EF, groups - 1)))
    return bound


def _singular(table: np.ndarray, count: int) -> float:
    """The sum of the largest singular values, from the square of the table, rounded up by what squaring may lose."""
    from scipy.linalg import eigvalsh

    square = table @ table.T if table.shape[0] <= table.shape[1] else table.T @ table
    last = len(square) - 1
    values = np.asarray(eigvalsh(square, subset_by_index=(max(0, last - count + 1), last)))
    return float(np.sqrt(np.maximum(values, 0) + 1e-13 * max(np.max(values), 0)).sum())


def _degrees(step_EF: np.ndarray, left: int, right: int) -> float:
    u_E, v_F, best = np.zeros(step_EF.shape[0]), np.zeros(step_EF.shape[1]), np.inf
    for _ in range(_ROUNDS):
        for axis in (1, 0):
            # The best dual of each row, the others' given, is its so-manieth largest entry: what is above costs more.
            rest_EF = step_EF - (v_F[None] if axis == 1 else u_E[:, None])
            dual = _nth_largest(rest_EF if axis == 1 else rest_EF.T, right if axis == 1 else left)
            u_E, v_F = (dual, v_F) if axis == 1 else (u_E, dual)
            over = np.maximum(step_EF - u_E[:, None] - v_F[None], 0).sum()
            best = min(best, float(right * u_E.sum() + left * v_F.sum() + over))
        v_F = v_F / 2  # halfway back: turns that each solve one side exactly would stand still at the first corner
    return best


def _nth_largest(table: np.ndarray, count: int) -> np.ndarray:
    """Any dual from a row's count-th largest entry to the next one is as good: their mean, at least 0."""
    columns = table.shape[1]
    if count >= columns:
        return np.zeros(len(table))
    sorted_ = np.partition(table, (columns - count - 1, columns - count), axis=1)
    return np.maximum((sorted_[:, columns - count] + sorted_[:, columns - count - 1]) / 2, 0)
