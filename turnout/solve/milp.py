"""Mixed-integer linear programs, solved by HiGHS through scipy, with the bound that it proved."""

import dataclasses
from typing import Any

import numpy as np

from turnout.errors import UsageError, word

__all__ = ["Program", "milp"]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What a solver found of an integer program.

    Args:
        x_N: the best values found; None where no feasible ones were found in time.
        value: what they cost; infinity for none.
        bound: no feasible values cost less.
        optimal: whether value and bound are one, to the solver's tolerance.

    >>> Program(np.zeros(1), 3.0, 2.0, False).gap
    0.3333333333333333

    Source: none; plain bookkeeping.
    """

    x_N: np.ndarray | None
    value: float
    bound: float
    optimal: bool

    @property
    def gap(self) -> float:
        """How much of the value is not proved to be needed."""
        return 0.0 if self.optimal else abs(self.value - self.bound) / max(abs(self.value), 1e-12)


def milp(
    cost_N: np.ndarray,
    rows_MN: Any,
    low_M: np.ndarray,
    high_M: np.ndarray,
    *,
    integer_N: np.ndarray,
    upper_N: np.ndarray | float = 1.0,
    seconds: float = 60.0,
) -> Program:
    """Min cost . x with low <= rows x <= high and 0 <= x <= upper, whole where ``integer_N`` says so.

    Args:
        cost_N: (N,).
        rows_MN: (M, N), dense or a scipy sparse array.
        low_M: (M,), -inf for none.
        high_M: (M,), inf for none.
        integer_N: (N,) bool.
        upper_N: (N,) or one for all.
        seconds: how long it may take; what was found until then is returned, with its bound.

    Returns:
        The best found.

    Raises:
        UsageError: nothing fits the rows.

    >>> milp(np.array([-1.0, -1.0]), np.array([[2.0, 2.0]]), np.array([-np.inf]), np.array([3.0]),
    ...      integer_N=np.array([True, True])).value
    -1.0

    Source: Huangfu & Hall, 2018, "Parallelizing the dual revised simplex method" (HiGHS), as scipy has it.
    """
    from scipy import optimize

    found = optimize.milp(
        cost_N,
        constraints=optimize.LinearConstraint(rows_MN, low_M, high_M),
        integrality=np.asarray(integer_N, dtype=int),
        bounds=optimize.Bounds(0, upper_N),
        options={"time_limit": float(seconds)},
    )
    if found.status not in (0, 1):
        got, fix = str(found.message), "loosen a row: a capacity, or the balance"
        raise UsageError(word("the program", got=got, allowed="have a solution", where="turnout.solve.milp", fix=fix))
    value = float(found.fun) if found.x is not None else np.inf
    bound = float(found.mip_dual_bound) if found.mip_dual_bound is not None else -np.inf
    return Program(found.x, value, bound, found.status == 0)
