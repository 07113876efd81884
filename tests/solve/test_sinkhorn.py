"""Entropic transport: its sums, what leaves it as it is, and its two ends."""

import pytest
import torch

from turnout.decide.token.balanced import even_assignment
from turnout.errors import UsageError
from turnout.solve.sinkhorn import sinkhorn

S = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)).double()


def test_rows_and_columns_have_their_sums():
    plan_TE = sinkhorn(S, iterations=1000, tolerance=1e-10)
    torch.testing.assert_close(plan_TE.sum(1), torch.full((24,), 1 / 24, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(plan_TE.sum(0), torch.full((4,), 1 / 4, dtype=torch.float64), atol=1e-9, rtol=0)


def test_constants_of_rows_and_columns_change_nothing():
    moved = S + torch.randn(24, 1).double() + torch.tensor([3.0, 0.0, -2.0, 1.0]).double()
    how = {"iterations": 1000, "tolerance": 1e-10}
    torch.testing.assert_close(sinkhorn(moved, **how), sinkhorn(S, **how), atol=1e-8, rtol=0)


def test_hot_it_is_uniform_and_cold_the_best_assignment():
    torch.testing.assert_close(sinkhorn(S, temperature=1e6), torch.full((24, 4), 1 / 96).double(), atol=1e-6, rtol=0)
    cold = sinkhorn(S, temperature=0.005, iterations=20_000, tolerance=1e-6)
    assert torch.equal(cold.argmax(1), even_assignment(S))


def test_large_scores_do_not_overflow():
    assert bool(torch.isfinite(sinkhorn(1e4 * S.float())).all())
    with pytest.raises(UsageError, match="temperature"):
        sinkhorn(S, temperature=0.0)
