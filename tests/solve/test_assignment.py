"""Assignment and transport meet brute force, and each other on larger problems."""

import itertools

import numpy as np
import pytest

from turnout.errors import ShapeError
from turnout.solve import assignment, transport


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("maximize", [False, True])
def test_assignment_is_the_best_of_all(seed: int, maximize: bool) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.integers(1, 6)
    cost_MN = rng.integers(-5, 6, (rows, rows + rng.integers(0, 3))).astype(float)
    found = assignment(cost_MN, maximize=maximize)
    sums = [cost_MN[range(rows), p].sum() for p in itertools.permutations(range(cost_MN.shape[1]), int(rows))]
    assert found.value == (max if maximize else min)(sums)
    assert len(set(found.column_M.tolist())) == rows
    assert cost_MN[range(rows), found.column_M].sum() == found.value


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("maximize", [False, True])
def test_transport_is_the_best_of_all(seed: int, maximize: bool) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = rng.integers(1, 7), rng.integers(1, 4)
    cost_MN = rng.integers(-3, 4, (rows, columns)) + rng.choice([0.0, 0.1])
    capacity_N = rng.multinomial(rows + rng.integers(0, 4), [1 / columns] * columns)
    found = transport(cost_MN, capacity_N, maximize=maximize)
    fits = [
        choice
        for choice in itertools.product(range(columns), repeat=int(rows))
        if (np.bincount(choice, minlength=columns) <= capacity_N).all()
    ]
    assert tuple(found.column_M) in fits
    sums = [cost_MN[range(rows), choice].sum() for choice in fits]
    assert found.value == pytest.approx((max if maximize else min)(sums), abs=1e-9), f"seed {seed}"


@pytest.mark.parametrize("seed", range(3))
def test_transport_equals_assignment_to_repeated_columns(seed: int) -> None:
    cost_MN = np.random.default_rng(seed).normal(size=(160, 8))
    capacity_N = np.full(8, 20)
    found = transport(cost_MN, capacity_N)
    assert np.bincount(found.column_M).tolist() == [20] * 8
    assert found.value == pytest.approx(assignment(np.repeat(cost_MN, 20, axis=1)).value, rel=1e-12)


def test_what_cannot_be_solved_is_refused() -> None:
    with pytest.raises(ShapeError, match="column for each row"):
        assignment(np.zeros((3, 2)))
    with pytest.raises(ShapeError, match="finite"):
        assignment(np.array([[np.nan]]))
    with pytest.raises(ShapeError, match="hold 3 rows"):
        transport(np.zeros((3, 2)), np.array([1, 1]))
    with pytest.raises(ShapeError, match="finite"):
        transport(np.array([[np.inf]]), np.array([1]))
