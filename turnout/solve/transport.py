"""Transport: each row one column, each column as many rows as it holds, at the least total cost."""

import heapq

import numpy as np

from turnout.errors import ShapeError, word
from turnout.solve.solution import Solution, checked_cost

__all__ = ["transport"]


def transport(cost_MN: np.ndarray, capacity_N: np.ndarray, *, maximize: bool = False) -> Solution:
    """The columns that minimise sum_m cost[m, column_m] while column n is given to at most capacity_n rows.

    Rows come one by one, each along the cheapest chain of moves that ends in a column with room, which keeps the
    solution so far optimal. It takes O(M (N^2 log M + N^3)) steps and O(M N) memory; repeating every column
    capacity_n times and calling ``assignment`` gives the same value in O(M^3) steps and O(M^2) memory.

    Args:
        cost_MN: (M, N), finite; meant for many rows and few columns.
        capacity_N: (N,) whole numbers of at least 0, together at least M.
        maximize: whether the entries are gains.

    Returns:
        The columns and the sum; exact.

    Raises:
        ShapeError: capacities that do not fit, or entries that are not finite.

    >>> transport(np.array([[1.0, 9.0], [2.0, 3.0], [1.0, 5.0]]), np.array([2, 1])).column_M.tolist()
    [0, 1, 0]

    Source: Ahuja, Magnanti & Orlin, 1993, "Network Flows", section 9.7, successive shortest paths, on the columns.
    """
    cost_MN, capacity_N = checked_cost(cost_MN, "turnout.solve.transport"), np.asarray(capacity_N)
    rows, columns = cost_MN.shape
    if capacity_N.shape != (columns,) or (capacity_N < 0).any() or capacity_N.sum() < rows:
        got, fix = f"{capacity_N.tolist()} for {rows} rows", "pass one capacity for each column, in sum at least M"
        where = "turnout.solve.transport"
        raise ShapeError(word("capacity_N", got=got, allowed=f"hold {rows} rows in {columns} columns", where=where,
                              fix=fix))  # fmt: skip
    plan = _Plan(-cost_MN if maximize else cost_MN, capacity_N.astype(np.int64))
    for row in range(rows):
        plan.insert(row)
    return Solution(plan.column_M, float(cost_MN[np.arange(rows), plan.column_M].sum()))


class _Plan:
    """An optimal solution for the rows so far, and for each pair of columns the row that moves most cheaply."""

    def __init__(self, cost_MN: np.ndarray, room_N: np.ndarray) -> None:
        self.cost_MN, self.room_N = cost_MN, room_N
        count = cost_MN.shape[1]
        self.column_M = np.full(cost_MN.shape[0], -1, dtype=np.int64)
        self.heaps: list[list[list[tuple[float, int]]]] = [[[] for _ in range(count)] for _ in range(count)]
        self.move_NN = np.full((count, count), np.inf)  # the least cost of moving some row from column a to column b

    def insert(self, row: int) -> None:
        """Gives one more row a column, moving others where that is cheaper."""
        far_N, parent_N = self._distances(self.cost_MN[row])
        here = int(np.where(self.room_N > 0, far_N, np.inf).argmin())
        self.room_N[here] -= 1
        moves = []
        while parent_N[here] >= 0:
            moves.append((self.heaps[parent_N[here]][here][0][1], here))
            here = int(parent_N[here])
        changed = {here}
        for moving, target in moves:
            changed |= {target, int(self.column_M[moving])}
            self._place(moving, target)
        self._place(row, here)
        for column in changed:
            self._refresh(column)

    def _distances(self, start_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The cheapest way into each column, by Bellman-Ford, and the column that it comes through (-1: none)."""
        far_N, parent_N = start_N.copy(), np.full(len(start_N), -1)
        for _ in range(len(start_N)):
            through_NN = far_N[:, None] + self.move_NN
            best_N = through_NN.argmin(0)
            near_N = through_NN[best_N, np.arange(len(start_N))]
            shorter_N = near_N < far_N - 1e-12 * (1 + np.abs(far_N))  # rounding must not make a circle
            if not shorter_N.any():
                break
            far_N, parent_N = np.where(shorter_N, near_N, far_N), np.where(shorter_N, best_N, parent_N)
        return far_N, parent_N

    def _place(self, row: int, column: int) -> None:
        self.column_M[row] = column
        for other, heap in enumerate(self.heaps[column]):
            if other != column:
                heapq.heappush(heap, (float(self.cost_MN[row, other] - self.cost_MN[row, column]), row))

    def _refresh(self, column: int) -> None:
        for other, heap in enumerate(self.heaps[column]):
            while heap and self.column_M[heap[0][1]] != column:
                heapq.heappop(heap)
            self.move_NN[column, other] = heap[0][0] if heap else np.inf
