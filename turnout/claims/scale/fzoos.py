"""Claim: with surrogates of all they asked, and of each other, unlike clients need fewer queries and rounds."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.train.zeroth import Federation, FZooS, fedzo
from turnout.train.zeroth import fzoos as solve

_WIDTH, _CLIENTS, _UNLIKE = 300, 5, 5.0
_ROUNDS, _STEPS, _ACTIVE, _RATE, _LENGTH, _FEATURES, _NEAREST = 10, 10, 95, 0.5, 3.0, 1000, 300
_FEDZO_ROUNDS, _FEDZO_RATES, _DIRECTIONS, _NEAR = 24, (1.0, 2.0, 4.0), 20, 0.01


def fzoos() -> Claim:
    """Five clients with quadratics of 300 coordinates whose curvatures and slopes are far from their mean's.

    The off arms ask as often: one corrects nothing, one forgets what was asked before the last round.

    >>> fzoos().off
    'no gradient correction'

    Source: Shu et al., 2023, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients".
    """
    left, reach = "share of the distance in value left, after as many queries", f"to a share of {_NEAR}"
    return Claim(
        name="fzoos",
        statement="Clients whose gradients come from surrogates of all their queries, corrected by a shared one, get "
        "nearer to the least of their mean with as many queries, and in fewer rounds, than by finite differences.",
        source="Shu et al., 2023, Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients",
        off="no gradient correction",
        switched={"fzoos": "uncorrected"},
        rows=(
            Row(left, "below", "fzoos", "uncorrected", "the same without correction"),
            Row(left, "below", "fzoos", "forgetful", "the same with the last round's queries alone"),
            Row(left, "below", "fzoos", "fedzo", "FedZO, more queries, at its best rate", headline=True),
            Row(f"thousands of queries {reach}", "below", "queries", "queries, fedzo", "FedZO at its best rate",
                headline=True),
            Row(f"rounds {reach}", "below", "rounds", "rounds, fedzo", "FedZO at its best rate", headline=True),
            Row(f"rounds {reach}", "below", "rounds", "rounds, scaffold", "FedZO with SCAFFOLD at its best rate",
                headline=True),
            Row(f"thousands of numbers sent {reach}", "below", "sent", "sent, fedzo", "FedZO at its best rate",
                headline=True),
        ),
        measure=_measure,
        seconds=14,
        note=f"d = {_WIDTH}, {_CLIENTS} clients, C = {_UNLIKE:.0f}, {_STEPS} local steps; {_FEATURES} features are "
        f"sent with the {_WIDTH} coordinates, so that fewer rounds are not fewer numbers. FedZO takes the best of the "
        f"rates {_FEDZO_RATES}, FZooS {_RATE} and a kernel's length of {_LENGTH} for all seeds. Its {_ACTIVE} active "
        "queries a round are all at the server's point: five a step, as in the released code, left five times as much",
        limits=(0.0, 400.0),
    )  # fmt: skip


class _Problem:
    """The paper's quadratics: f_c(x) = 0.1 / d (a_c u^2 + b_c u + 1), u = 20 x - 10, whose mean has a = b = 1."""

    def __init__(self, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        self.bent_CD, self.slope_CD = self._unlike(chance), self._unlike(chance)
        self.start_D = torch.rand(_WIDTH, generator=chance, dtype=torch.float64)

    def _unlike(self, chance: torch.Generator) -> Tensor:
        """Around 1, as far as a Dirichlet variable is from its mean: one client has nearly all of a coordinate."""
        share = torch.full((_WIDTH, _CLIENTS), 1.0 / _CLIENTS, dtype=torch.float64)
        drawn_DC = torch._standard_gamma(share, generator=chance)
        return (1 + _UNLIKE * (drawn_DC / drawn_DC.sum(1, keepdim=True) - 1 / _CLIENTS)).T.contiguous()

    @property
    def functions(self) -> list[Callable[[Tensor], Tensor]]:
        return [lambda x, a=a, b=b: _value(x, a, b) for a, b in zip(self.bent_CD, self.slope_CD, strict=True)]

    def left(self, run: Federation) -> list[float]:
        """What is left, round by round, of the mean's value above its least, which is at u = -1/2."""
        above_R = (20 * run.x_RD - 9.5).square().sum(1)
        return (above_R / above_R[0]).tolist()


def _value(x_D: Tensor, bent_D: Tensor, slope_D: Tensor) -> Tensor:
    u_D = 20 * x_D - 10
    return 0.1 / _WIDTH * ((bent_D * u_D + slope_D) @ u_D + 1)


def _measure(seed: int) -> Values:
    problem = _Problem(seed)
    run = _surrogates(problem, seed)
    left, found = problem.left(run), {}
    kinds: tuple[tuple[Literal["none", "scaffold"], str], ...] = (("none", "fedzo"), ("scaffold", "scaffold"))
    for kind, name in kinds:
        runs = [
            fedzo(problem.functions, problem.start_D, rounds=_FEDZO_ROUNDS, rate=rate, local_steps=_STEPS,
                  directions=_DIRECTIONS, correction=kind, seed=seed)
            for rate in _FEDZO_RATES
        ]  # fmt: skip
        costs = [_cost(one, problem.left(one)) for one in runs]
        found |= {f"{what}, {name}": min(cost[what] for cost in costs) for what in costs[0]}
        found[name] = min(_after(one, problem.left(one), run.queries_R[-1]) for one in runs)
    return found | _cost(run, left) | {
        "fzoos": left[-1],
        "uncorrected": problem.left(_surrogates(problem, seed, correction=0.0))[-1],
        "forgetful": problem.left(_surrogates(problem, seed, memory=_STEPS + 1 + _ACTIVE))[-1],
    }  # fmt: skip


def _surrogates(problem: _Problem, seed: int, *, correction: float = 1.0, memory: int | None = None) -> Federation:
    how = FZooS(
        rate=_RATE, length=_LENGTH, local_steps=_STEPS, active=0, shared_active=_ACTIVE, candidates=200,
        nearest=_NEAREST, num_features=_FEATURES, correction=correction, memory=memory,
    )  # fmt: skip
    return solve(problem.functions, problem.start_D, how, rounds=_ROUNDS, seed=seed)


def _cost(run: Federation, left: list[float]) -> dict[str, float]:
    """What it took to come near; where it did not, what it took in vain, which is less than it would have."""
    at = next((number for number, share in enumerate(left) if share <= _NEAR), len(left) - 1)
    return {"rounds": float(at), "queries": run.queries_R[at] / 1000, "sent": run.sent_R[at] / 1000}


def _after(run: Federation, left: list[float], queries: int) -> float:
    """What is left after the first round by which it has asked at least so often."""
    return next(share for share, asked in zip(left, run.queries_R, strict=True) if asked >= queries)
