"""Sparsity-constrained transport: a plan whose columns have at most k entries each."""

import dataclasses

import numpy as np

from turnout.errors import ShapeError, UsageError, word
from turnout.solve.solution import checked_cost

__all__ = ["SparsePlan", "sparse_projection", "transport_sparse"]

_WHERE = "turnout.solve.transport_sparse"


@dataclasses.dataclass(frozen=True, eq=False)
class SparsePlan:
    """What a solver of sparse transport found.

    Args:
        plan_MN: (M, N) the plan, of which each column sums to its b and has at most k entries.
        potential_M: (M,) of the rows.
        dual: the value of the semi-dual there; the least cost is never below it.

    >>> SparsePlan(np.eye(2), np.zeros(2), 0.0).plan_MN.shape
    (2, 2)

    Source: none; plain bookkeeping.
    """

    plan_MN: np.ndarray
    potential_M: np.ndarray
    dual: float


def sparse_projection(x_MN: np.ndarray, k: int) -> np.ndarray:
    """(M, N) each column's nearest point of the simplex with at most k entries above 0.

    It is the projection onto the simplex of the column's k largest; of equal ones the earlier row.

    Args:
        x_MN: (M, N), finite.
        k: at least 1; M or more leaves the number of entries open.

    >>> sparse_projection(np.array([[0.9], [0.7], [0.6]]), 2).ravel().round(3).tolist()
    [0.6, 0.4, 0.0]

    Source: Kyrillidis et al., 2013, "Sparse Projections onto the Simplex".
    """
    rows, columns = x_MN.shape
    order_MN = np.argsort(-x_MN, axis=0, kind="stable")[: min(k, rows)]
    top_KN = np.take_along_axis(x_MN, order_MN, 0)
    rank_K1 = np.arange(1, len(top_KN) + 1)[:, None]
    level_KN = (np.cumsum(top_KN, 0) - 1) / rank_K1
    count_N = (top_KN > level_KN).sum(0)
    point_MN = np.zeros_like(x_MN)
    kept_KN = np.maximum(top_KN - level_KN[count_N - 1, np.arange(columns)], 0)
    np.put_along_axis(point_MN, order_MN, kept_KN, 0)
    return point_MN


def transport_sparse(
    cost_MN: np.ndarray, row_M: np.ndarray, column_N: np.ndarray, *, k: int, gamma: float = 1.0, steps: int = 1000
) -> SparsePlan:
    """The plan T >= 0 of least <T, C> + gamma/2 |T|^2 with these sums of rows and columns, at most k entries a column.

    What is maximised is the semi-dual D(alpha) = <alpha, a> - sum_j b_j max over p in the k-sparse simplex of
    (<p, alpha - c_j> - gamma b_j / 2 |p|^2), concave and without constraints, by L-BFGS. For k = 1 D is that of the
    linear program plus gamma/2 sum_j b_j^2; for k = M it is that of quadratic transport. In between the plan may miss a
    row's sum where the k-th and next entries of a column are equal; its columns' sums always hold.

    Args:
        cost_MN: (M, N), finite.
        row_M: (M,) a, the rows' sums, above 0.
        column_N: (N,) b, the columns' sums, above 0, of the same total.
        k: entries a column at most, at least 1.
        gamma: above 0: the larger, the more even the entries of a column.
        steps: the most steps of the solver.

    Raises:
        ShapeError: sums that do not fit, or entries that are not finite.
        UsageError: k, gamma or steps out of range.

    >>> plan = transport_sparse(np.array([[0.0, 1.0], [1.0, 0.0]]), np.ones(2), np.ones(2), k=1)
    >>> plan.plan_MN.round(3).tolist(), round(plan.dual, 3)
    ([[1.0, 0.0], [0.0, 1.0]], 1.0)

    Source: Liu, Puigcerver & Blondel, 2023, "Sparsity-Constrained Optimal Transport", their semi-dual.
    """
    from scipy.optimize import minimize

    cost_MN = checked_cost(cost_MN, _WHERE)
    row_M, column_N = np.asarray(row_M, dtype=np.float64), np.asarray(column_N, dtype=np.float64)
    _check(cost_MN, row_M, column_N, k, gamma, steps)
    plan_MN = np.zeros_like(cost_MN)

    def negative(alpha_M: np.ndarray) -> tuple[float, np.ndarray]:
        x_MN = alpha_M[:, None] - cost_MN
        share_MN = sparse_projection(x_MN / (gamma * column_N), k)
        value_N = (share_MN * x_MN).sum(0) - gamma * column_N / 2 * (share_MN**2).sum(0)
        plan_MN[:] = share_MN * column_N
        return float((column_N * value_N).sum() - alpha_M @ row_M), plan_MN.sum(1) - row_M

    options = {"maxiter": steps, "maxfun": 20 * steps, "ftol": 1e-15, "gtol": 1e-10}
    found = minimize(negative, np.zeros(len(row_M)), jac=True, method="L-BFGS-B", options=options)
    dual = -negative(found.x)[0]
    return SparsePlan(plan_MN.copy(), found.x, dual)


def _check(cost_MN: np.ndarray, row_M: np.ndarray, column_N: np.ndarray, k: int, gamma: float, steps: int) -> None:
    same = row_M.shape + column_N.shape == cost_MN.shape
    if not same or not (row_M > 0).all() or not (column_N > 0).all() or not np.isclose(row_M.sum(), column_N.sum()):
        got = f"{row_M.sum():g} in {len(row_M)} rows and {column_N.sum():g} in {len(column_N)} columns"
        allowed, fix = (
            f"be positive, of one total, for a cost {cost_MN.shape}",
            "scale one of them to the other's total",
        )
        raise ShapeError(word("row_M and column_N", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if k < 1 or not 0 < gamma < float("inf") or steps < 1:
        got, allowed = f"{k}, {gamma} and {steps}", "be at least 1, above 0, and at least 1"
        raise UsageError(word("k, gamma and steps", got=got, allowed=allowed, where=_WHERE, fix="pass k=1, gamma=1.0"))
