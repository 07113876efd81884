"""FedZO: clients step along finite differences of their own functions, and a server takes the mean."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from turnout.errors import TrainingError, UsageError, word
from turnout.expects import expects, several

__all__ = ["Federation", "asked", "fedzo"]

_WHERE = "turnout.train.zeroth"


@dataclasses.dataclass(frozen=True, eq=False)
class Federation:
    """What the rounds were, and cost.

    Args:
        x_RD: the server's point: the start, and after each round.
        queries_R: how often the clients' functions had been asked by then, all together.
        sent_R: how many numbers had travelled by then, up and down, all together.

    >>> Federation(torch.zeros(1, 2), (0,), (0,)).queries_R
    (0,)

    Source: none; plain bookkeeping.
    """

    x_RD: Tensor
    queries_R: tuple[int, ...]
    sent_R: tuple[int, ...]


@expects(functions=several(Callable))  # pyrefly: ignore[bad-argument-type] - a form, not a class, to checkers
def fedzo(
    functions: Sequence[Callable[[Tensor], Tensor | float]], start_D: Tensor, *, rounds: int, rate: float,
    local_steps: int = 10, directions: int = 20, radius: float = 0.01,
    correction: Literal["none", "prox", "scaffold"] = "none", strength: float = 1.0, seed: int = 0,
) -> Federation:  # fmt: skip
    """Minimises the mean of the clients' functions; each estimates its gradient by differences in a few directions.

    g = sum_q (f(x + r u_q) - f(x)) / r u_q, with orthonormal u_q drawn for each step; x <- x - rate g, so many times,
    and the server takes the mean. ``prox`` adds strength (x - server's x) to g (FedProx), ``scaffold`` adds strength
    times the mean g of all clients in the round before less the client's own (SCAFFOLD).

    Args:
        functions: one a client, from a point (D,) to a number; all count alike.
        start_D: where the server starts.
        rounds: how many, from 0.
        rate: of a local step, above 0.
        local_steps: in a round, at least 1.
        directions: Q, from 1 to D; a step asks Q + 1 times.
        radius: r of the differences, above 0.
        correction: of the drift between clients.
        strength: of the correction, from 0.
        seed: of the directions.

    Raises:
        UsageError: no function, or a setting out of range.
        TrainingError: a function says something that is not finite.

    >>> at = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    >>> bowls = [lambda x, own=own: (x - own).square().sum() for own in at]
    >>> run = fedzo(bowls, torch.ones(2), rounds=20, rate=0.1, directions=2)
    >>> run.x_RD[-1].round(decimals=1).tolist(), run.queries_R[-1], run.sent_R[-1]
    ([0.5, 0.5], 1200, 160)

    Source: Fang et al., 2022, "Communication-Efficient Stochastic Zeroth-Order Optimization for Federated Learning".
    Where we differ: directions are orthonormal, as in the experiments of Shu et al., 2023.
    """
    _check(len(functions), start_D, rounds, rate, local_steps, directions, radius, correction, strength)
    chance = torch.Generator().manual_seed(seed)
    x_D, clients, width = start_D.detach().double(), len(functions), start_D.numel()
    trail, before_CD = [x_D], torch.zeros(clients, width, dtype=torch.float64)
    travel = 2 * width * clients * (2 if correction == "scaffold" else 1)
    for number in range(rounds):
        ends, mean_CD = [], torch.zeros_like(before_CD)
        for at, function in enumerate(functions):
            here_D, who = x_D, f"client {at} in round {number}"
            for _ in range(local_steps):
                found_D = _difference(function, here_D, directions, radius, chance, who)
                mean_CD[at] += found_D / local_steps
                off_D = before_CD.mean(0) - before_CD[at] if correction == "scaffold" else here_D - x_D
                here_D = here_D - rate * (found_D + (strength * off_D if correction != "none" else 0))
            ends.append(here_D)
        x_D, before_CD = torch.stack(ends).mean(0), mean_CD
        trail.append(x_D)
    asks, counts = clients * local_steps * (directions + 1), range(rounds + 1)
    return Federation(torch.stack(trail), tuple(asks * r for r in counts), tuple(travel * r for r in counts))


def asked(function: Callable[[Tensor], Tensor | float], x_D: Tensor, who: str) -> float:
    """What the function says.

    Args:
        function: from a point to a number.
        x_D: the point.
        who: whose it is, for messages.

    Raises:
        TrainingError: a number that is not finite.

    >>> asked(torch.sum, torch.ones(3), "client 0")
    3.0

    Source: none; plain bookkeeping.
    """
    value = float(function(x_D))
    if not math.isfinite(value):
        got, fix = f"{value} of {who}", "take a lower rate"
        raise TrainingError(word("a function's value", got=got, allowed="be finite", where=_WHERE, fix=fix))
    return value


def _difference(
    function: Callable[[Tensor], Tensor | float],
    x_D: Tensor,
    count: int,
    radius: float,
    chance: torch.Generator,
    who: str,
) -> Tensor:
    """(D,) the slope in some directions, and nothing in the others."""
    drawn_DQ = torch.randn(len(x_D), count, generator=chance, dtype=torch.float64)
    along_QD = torch.linalg.qr(drawn_DQ)[0].T
    level = asked(function, x_D, who)
    slopes = [(asked(function, x_D + radius * u_D, who) - level) / radius for u_D in along_QD]
    return torch.tensor(slopes, dtype=torch.float64) @ along_QD


def _check(
    clients: int, start_D: Tensor, rounds: int, rate: float, steps: int, directions: int, radius: float,
    correction: str, strength: float,
) -> None:  # fmt: skip
    fits = clients >= 1 and start_D.dim() == 1 and rounds >= 0 and steps >= 1 and strength >= 0
    kinds = ("none", "prox", "scaffold")
    if not (fits and rate > 0 and radius > 0 and 1 <= directions <= start_D.numel() and correction in kinds):
        got = (
            f"{clients} functions, a start {tuple(start_D.shape)}, rounds={rounds}, rate={rate}, local_steps={steps}, "
        )
        got += f"directions={directions}, radius={radius}, correction={correction!r}, strength={strength}"
        allowed = f"be positive, directions to the start's length, with a correction of {', '.join(kinds)}"
        fix = "pass one function a client, a start (D,), rate=0.1, directions=20"
        raise UsageError(word("the settings", got=got, allowed=allowed, where=f"{_WHERE}.fedzo", fix=fix))
