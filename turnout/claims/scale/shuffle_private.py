"""Claim: with a shuffler, private SGD is nearly as good as with a trusted server, and far better than without."""

import dataclasses
import math
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from turnout.claims.claim import Claim, Row, Values
from turnout.train.federated import ShuffledSum, private_sgd, shuffled_sum

_USERS, _BATCH, _WIDTH, _EPS, _DELTA, _BOUND, _RATE, _RADIUS = 8000, 400, 5, 1.0, 1e-5, 1.0, 10.0, 6.0
_RUNS = 4  # of the noise, on one seed's users


def shuffle_private() -> Claim:
    """Logistic regression on 8,000 users, each asked once, at eps 1: with shuffled coins, and with Gaussian noise.

    The off arm is the local model: no shuffler, so that each user's own message is private. The central model adds
    Gaussian noise to a sum that a server is trusted with.

    >>> shuffle_private().off
    'no shuffler: every message is private by itself'

    Source: Cheu, Joseph, Mao & Peng, 2022, "Shuffle Private Stochastic Convex Optimization".
    """
    excess, why = "excess logistic loss, nats", "a twentieth of the loss to begin with"
    return Claim(
        name="shuffle_private",
        statement="Private sums through a shuffler, in mini-batch SGD, lose much less than local privacy, and little "
        "more than a trusted server.",
        source="Cheu, Joseph, Mao & Peng, 2022, Shuffle Private Stochastic Convex Optimization",
        off="no shuffler: every message is private by itself",
        switched={"shuffle": "local"},
        rows=(
            Row(excess, "below", "shuffle", "local", "local privacy"),
            Row(excess, "no_worse", "shuffle", "central", "a trusted server", margin=0.03, why=why, headline=True),
            Row("noise of a sum over that of a trusted server", "within", "deviation over central",
                "deviation local over central", "local privacy", bound=3.0, headline=True),
        ),
        measure=_measure,
        seconds=6,
        note=f"{_USERS} users, batches of {_BATCH}, {_WIDTH} numbers, eps {_EPS}, delta {_DELTA} of the whole run, one "
        f"pass, the mean of {_RUNS} runs. "
        "Excess without noise {none:.4f}. The accountant is Renyi's, with the binomial's own probabilities; "
        "the Gaussians have the usual sqrt(2 ln 1.25 / delta)",
        limits=(0.0, 60.0),
    )  # fmt: skip


def _measure(seed: int) -> Values:
    chance = torch.Generator().manual_seed(seed)
    truth_D = torch.randn(_WIDTH, generator=chance)
    truth_D = 2 * truth_D / truth_D.norm()
    x_ND = torch.randn(_USERS, _WIDTH, generator=chance)
    x_ND = x_ND / x_ND.norm(dim=1, keepdim=True)  # gradients are of length at most 1
    y_N = (torch.rand(_USERS, generator=chance) < torch.sigmoid(3 * x_ND @ truth_D)).float()
    users = list(zip(x_ND, y_N, strict=True))
    plan = shuffled_sum(_BATCH, _WIDTH, bound=_BOUND, eps=_EPS, delta=_DELTA)
    gauss = 2 * _BOUND * math.sqrt(2 * math.log(1.25 / _DELTA)) / _EPS

    def gaussian(noise: float) -> _Gaussian:
        own = torch.Generator().manual_seed(seed + 1)
        return _Gaussian(**dataclasses.asdict(plan), noise=noise, chance=own)

    plans = {
        "shuffle": plan,
        "local": gaussian(gauss * math.sqrt(_BATCH)),
        "central": gaussian(gauss),
        "none": gaussian(0.0),
    }
    best = _best(x_ND, y_N)
    found = {}
    for name, one in plans.items():
        ends = [
            private_sgd(torch.zeros(_WIDTH), users, _gradient, plan=one, rate=_RATE, radius=_RADIUS, seed=again)
            for again in range(seed, seed + 1000 * _RUNS, 1000)
        ]
        found[name] = statistics.fmean(_loss(end, x_ND, y_N) for end in ends) - best
    over = {"deviation over central": plan.deviation / gauss, "deviation local over central": math.sqrt(_BATCH)}
    return {name: max(0.0, value) for name, value in found.items()} | over


def _gradient(at_D: Tensor, user: tuple[Tensor, Tensor]) -> Tensor:
    x_D, y = user
    return (torch.sigmoid(x_D @ at_D) - y) * x_D


def _loss(at_D: Tensor, x_ND: Tensor, y_N: Tensor) -> float:
    return float(torch.nn.functional.binary_cross_entropy_with_logits(x_ND @ at_D, y_N))


def _best(x_ND: Tensor, y_N: Tensor) -> float:
    """The least loss within the radius, by gradient descent with everybody's data."""
    at_D = torch.zeros(_WIDTH)
    for _ in range(2000):
        at_D = at_D - 2.0 * ((torch.sigmoid(x_ND @ at_D) - y_N)[:, None] * x_ND).mean(0)
        at_D = at_D * min(1.0, _RADIUS / float(at_D.norm()))
    return _loss(at_D, x_ND, y_N)


@dataclasses.dataclass(frozen=True)
class _Gaussian(ShuffledSum):
    """Vectors in full, and Gaussian noise of one deviation on a coordinate of their sum, in place of the coins."""

    noise: float = 0.0
    chance: torch.Generator = dataclasses.field(default_factory=torch.Generator)

    def bits(self, vector_D: Tensor, generator: torch.Generator) -> Tensor:
        """The vector, shortened to the bound."""
        return vector_D.double() * min(1.0, self.bound / max(float(vector_D.norm()), 1e-300))

    def total(self, bits_ND: Sequence[Tensor]) -> Tensor:
        """The sum and its noise."""
        sum_D = torch.stack(list(bits_ND)).sum(0)
        return sum_D + self.noise * torch.randn(sum_D.shape, generator=self.chance, dtype=torch.float64)
