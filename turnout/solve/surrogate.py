"""SurCo: a choice that is best for a cost with no solver, as the solution of a linear problem that has one."""

import dataclasses
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from turnout.errors import UsageError, word

__all__ = ["Surrogate", "surrogate"]

_WHERE = "turnout.solve.surrogate"


@dataclasses.dataclass(frozen=True, eq=False)
class Surrogate:
    """The best choice seen, and the linear costs that lead to it.

    Args:
        x_N: the choice.
        value: its cost.
        cost_N: linear costs whose best choice it is.
        first: the cost of the choice that the starting costs gave.
        solves: how often the linear problem was solved.

    >>> Surrogate(np.ones(1), 1.0, np.zeros(1), 2.0, 3).value
    1.0

    Source: none; plain bookkeeping.
    """

    x_N: np.ndarray
    value: float
    cost_N: np.ndarray
    first: float
    solves: int


def surrogate(
    cost: Callable[[Tensor], Tensor],
    oracle: Callable[[np.ndarray], np.ndarray],
    start_N: np.ndarray,
    *,
    guide: Callable[[Tensor], Tensor] | None = None,
    steps: int = 60,
    reach: float = 1.0,
    rate: float = 0.1,
) -> Surrogate:
    """The least f(x) over a set X that a solver of linear problems knows: x(c) = argmin_X c . x, with c learned.

    c = sigmoid(raw). At x = x(c), the gradient of f, to the length of c, moves the costs to c + reach df/dx; where the
    best choice for those, x', differs from x, the gradient of c is x' - x. Adam takes a step on raw. The best x seen is
    returned.

    Args:
        cost: f, of a tensor of the shape of ``start_N``; differentiable almost everywhere.
        oracle: linear costs -> x of the same shape, exact.
        start_N: the first costs, between 0 and 1.
        guide: what the gradients are of, where f itself is too flat, like a maximum; None for f.
        steps: of the descent; each solves the linear problem twice.
        reach: lambda, how far the gradient moves the costs, over the spread that they have.
        rate: of Adam.

    Returns:
        The best choice seen.

    Raises:
        UsageError: costs outside (0, 1).

    >>> pick = lambda cost_N: np.eye(3)[cost_N.argmin()]
    >>> surrogate(lambda x: (x * torch.tensor([3.0, 1.0, 2.0])).sum() ** 2, pick, np.array([0.4, 0.5, 0.6])).value
    1.0

    Source: Ferber et al., 2023, "SurCo: Learning Linear Surrogates for Combinatorial Nonlinear Optimization Problems",
    SurCo-zero; the step through the solver is Pogancic et al., 2020, "Differentiation of Blackbox Combinatorial
    Solvers", without its 1 / lambda, which Adam does not see. The gradient
    is scaled here; theirs is not, and costs are kept positive, which assignments do not need.
    """
    raw = _raw(start_N)
    adam, first = torch.optim.Adam([raw], lr=rate), np.inf
    best: Surrogate | None = None
    for step in range(steps):
        cost_N = torch.sigmoid(raw)
        x = torch.tensor(oracle(cost_N.detach().numpy()), dtype=torch.float64, requires_grad=True)
        value = float(cost(x).detach())
        first = value if step == 0 else first
        if best is None or value < best.value:
            best = Surrogate(x.detach().numpy(), value, cost_N.detach().numpy(), first, 2 * steps)
        (slope,) = torch.autograd.grad((guide or cost)(x), x)
        moved = cost_N.detach() + reach * slope * (cost_N.detach().std() / slope.std().clamp(min=1e-30))
        improved = torch.from_numpy(np.asarray(oracle(moved.numpy()), dtype=float))
        adam.zero_grad()
        cost_N.backward(improved - x.detach())
        adam.step()
    assert best is not None, "steps is at least 1"
    return best


def _raw(start_N: np.ndarray) -> Tensor:
    if not (start_N > 0).all() or not (start_N < 1).all():
        got, fix = f"costs from {start_N.min():.3g} to {start_N.max():.3g}", "pass np.full(shape, 0.5)"
        raise UsageError(word("start_N", got=got, allowed="lie between 0 and 1", where=_WHERE, fix=fix))
    return torch.logit(torch.tensor(start_N, dtype=torch.float64)).requires_grad_()
