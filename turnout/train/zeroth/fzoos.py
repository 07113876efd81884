"""FZooS: clients step along gradients of surrogates of all they have asked, corrected by one that they share."""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.expects import expects, several
from turnout.train.zeroth.fedzo import Federation, asked
from turnout.train.zeroth.surrogate import Features, Surrogate, features, surrogate

__all__ = ["FZooS", "fzoos"]

_WHERE = "turnout.train.zeroth"


@dataclasses.dataclass(frozen=True)
class FZooS:
    """How clients ask and step.

    Args:
        rate: of a local step, above 0.
        length: of the kernel, above 0: on the order of how far the start is from the end.
        local_steps: in a round, at least 1.
        correction: its length at the first step, from 0, which is none.
        decay: how fast it gets shorter, from 0, which is not at all.
        active: queries after a step, but the last, of the ``candidates`` whose gradient is least certain.
        shared_active: as many, at the server's new point, and at the start.
        candidates: drawn uniformly from the cube of half-width ``radius`` around the point.
        radius: above 0.
        nearest: of the queries, that a surrogate is made of, at least 1.
        memory: how many of its last queries a client keeps, at least 1; None is all.
        num_features: M, numbers that each client sends, and gets, a round, besides its point; none without correction.
        noise: variance of the values over that of the function, above 0.

    Raises:
        UsageError: a setting out of range.

    >>> FZooS(rate=0.1, length=1.0).nearest
    150

    Source: Shu et al., 2023, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients"; but
    for the features, of which there are 10,000, the defaults are those of the released code.
    """

    rate: float
    length: float
    local_steps: int = 10
    correction: float = 1.0
    decay: float = 1.0
    active: int = 5
    shared_active: int = 50
    candidates: int = 100
    radius: float = 0.01
    nearest: int = 150
    memory: int | None = None
    num_features: int = 1000
    noise: float = 1e-6

    def __post_init__(self) -> None:
        above = min(self.rate, self.length, self.radius, self.noise) > 0 and min(self.correction, self.decay) >= 0
        counts = min(self.local_steps, self.nearest, self.num_features, 1 if self.memory is None else self.memory) >= 1
        chosen = 0 <= min(self.active, self.shared_active) <= max(self.active, self.shared_active) <= self.candidates
        if not (above and counts and chosen):
            got = ", ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())
            allowed = "be positive, correction, decay and the active from 0, the active no more than the candidates"
            fix = "pass rate=0.1, length=1.0 and leave the others"
            raise UsageError(word("the settings", got=got, allowed=allowed, where=f"{_WHERE}.FZooS", fix=fix))


@expects(functions=several(Callable), how=FZooS)  # pyrefly: ignore[bad-argument-type] - a form, not a class, to checkers
def fzoos(
    functions: Sequence[Callable[[Tensor], Tensor | float]], start_D: Tensor, how: FZooS, *, rounds: int, seed: int = 0
) -> Federation:
    """Minimises the mean of the clients' functions, one query a step and a few where a surrogate is least certain.

    A client steps t = 1, 2, ... along the gradient of its surrogate, of the queries nearest to where it is,

        g = gradient_own(x) + correction / t^decay (gradient_all(x) - gradient_own'(x)),

    where own' is its surrogate in random features at the end of the last round and all the mean of those over clients:
    the correction follows x, and is trusted less the further the client has gone. The server takes the mean of points.

    Args:
        functions: one a client, from a point (D,) to a number; all count alike.
        start_D: where the server starts.
        how: the settings.
        rounds: how many, from 0.
        seed: of candidates and features.

    Raises:
        UsageError: no function, a start that is no vector, or rounds below 0.
        TrainingError: a function says something that is not finite.

    >>> at = [torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])]
    >>> how = FZooS(rate=0.1, length=2.0, active=0, shared_active=3, num_features=50)
    >>> run = fzoos([lambda x, own=own: (x - own).square().sum() for own in at], torch.ones(2), how, rounds=20)
    >>> run.x_RD[-1].round(decimals=1).tolist(), run.queries_R[-1], run.sent_R[-1]
    ([0.5, 0.5], 568, 4160)

    Source: Shu et al., 2023, "Federated Zeroth-Order Optimization using Trajectory-Informed Surrogate Gradients". Where
    we differ: plain gradient steps, where the released code takes Adam's; one given kernel for clients and features,
    where it fits a Matern kernel to a client's; a server's point that is worse is kept.
    """
    if not functions or start_D.dim() != 1 or not start_D.numel() or rounds < 0:
        got = f"{len(functions)} functions, a start {tuple(start_D.shape)}, rounds={rounds}"
        allowed, fix = "be one or more, a vector, and from 0", "pass one function a client, a start (D,), rounds=10"
        raise UsageError(word("the clients", got=got, allowed=allowed, where=f"{_WHERE}.fzoos", fix=fix))
    chance = torch.Generator().manual_seed(seed)
    x_D, width = start_D.detach().double(), start_D.numel()
    phi = features(width, how.num_features, length=how.length, seed=seed)
    clients = [_Client(function, f"client {at}", how, width, chance) for at, function in enumerate(functions)]
    for one in clients:
        one.look(x_D)
    off_CM: list[Tensor | None] = [None] * len(clients)
    trail, queries = [x_D], [sum(one.count for one in clients)]
    for _ in range(rounds):
        x_D = torch.stack([one.walk(x_D, phi, off_M) for one, off_M in zip(clients, off_CM, strict=True)]).mean(0)
        for one in clients:
            one.look(x_D)
        if how.correction:
            weight_CM = torch.stack([phi.weights(*one.around(x_D), noise=how.noise) for one in clients])
            off_CM = list(weight_CM.mean(0) - weight_CM)
        trail.append(x_D)
        queries.append(sum(one.count for one in clients))
    travel = 2 * len(clients) * (width + (how.num_features if how.correction else 0))
    return Federation(torch.stack(trail), tuple(queries), tuple(travel * r for r in range(rounds + 1)))


class _Client:
    """A function, and all that it was asked."""

    def __init__(
        self, function: Callable[[Tensor], Tensor | float], name: str, how: FZooS, width: int, chance: torch.Generator
    ) -> None:
        self.function, self.name, self.how, self.chance = function, name, how, chance
        self.points_ND = torch.empty(0, width, dtype=torch.float64)
        self.values_N = torch.empty(0, dtype=torch.float64)
        self.count = 0

    def look(self, x_D: Tensor) -> None:
        """Asks at the server's point, and around it."""
        self.ask(x_D[None])
        self.explore(x_D, self.how.shared_active)

    def walk(self, x_D: Tensor, phi: Features, off_M: Tensor | None) -> Tensor:
        """Where the steps of a round lead; ``off_M`` is what all weights are more than its own."""
        for step in range(self.how.local_steps):
            found_D = self.near(x_D).gradient(x_D)
            if off_M is not None:
                found_D = found_D + self.how.correction / (step + 1) ** self.how.decay * phi.gradient(off_M, x_D)
            x_D = x_D - self.how.rate * found_D
            self.ask(x_D[None])
            if step + 1 < self.how.local_steps:
                self.explore(x_D, self.how.active)
        return x_D

    def ask(self, x_BD: Tensor) -> None:
        said_B = torch.tensor([asked(self.function, x_D, self.name) for x_D in x_BD], dtype=torch.float64)
        kept = slice(None if self.how.memory is None else -self.how.memory, None)
        self.points_ND = torch.cat((self.points_ND, x_BD))[kept]
        self.values_N = torch.cat((self.values_N, said_B))[kept]
        self.count += len(x_BD)

    def around(self, x_D: Tensor) -> tuple[Tensor, Tensor]:
        """The queries nearest to a point, and what the function said."""
        distance_N = (self.points_ND - x_D).square().sum(1)
        near_K = distance_N.topk(min(self.how.nearest, len(distance_N)), largest=False).indices
        return self.points_ND[near_K], self.values_N[near_K]

    def near(self, x_D: Tensor) -> Surrogate:
        return surrogate(*self.around(x_D), length=self.how.length, noise=self.how.noise)

    def explore(self, x_D: Tensor, count: int) -> None:
        """Asks around a point where the gradient is least certain."""
        if not count:
            return
        drawn_BD = torch.rand(self.how.candidates, len(x_D), generator=self.chance, dtype=torch.float64)
        there_BD = x_D + self.how.radius * (2 * drawn_BD - 1)
        self.ask(there_BD[self.near(x_D).doubt(there_BD).topk(count).indices])
