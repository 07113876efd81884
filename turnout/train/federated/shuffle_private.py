"""Shuffle privacy: users add a few coins each, a shuffler mixes their bits, and sums of vectors are private."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch
from scipy.special import gammaln
from scipy.stats import binom
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.expects import expects

__all__ = ["ShuffledSum", "private_sgd", "shuffled_sum"]

User = TypeVar("User")
_WHERE = "turnout.train.federated"
_ORDERS = (1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0)


@dataclasses.dataclass(frozen=True)
class ShuffledSum:
    """A private sum of n vectors of length at most ``bound``: how they are rounded, and how many coins are tossed.

    A user rounds each coordinate by chance to one of 2 g + 1 levels between -bound and bound, and sends, for each, as
    many ones among 2 g + b bits as its level is above the lowest, and as heads in b fair tosses. The shuffler mixes the
    bits of a coordinate, so that their sum is all that is seen: the sum of the levels, and a binomial of n b tosses.

    Args:
        users: n.
        dimensions: d.
        bound: the largest l2 length; longer vectors are shortened to it.
        levels: g.
        coins: b.
        eps: what ``delta`` goes with, by the accountant.
        delta: the chance that it does not hold.

    >>> plan = shuffled_sum(200, 4, bound=1.0, eps=1.0, delta=1e-5)
    >>> plan.eps <= 1.0, plan.bits_a_user == 4 * (2 * plan.levels + plan.coins)
    (True, True)

    Source: Cheu, Joseph, Mao & Peng, 2022, "Shuffle Private Stochastic Convex Optimization".
    """

    users: int
    dimensions: int
    bound: float
    levels: int
    coins: int
    eps: float
    delta: float

    @property
    def bits_a_user(self) -> int:
        """The bits that one user sends."""
        return self.dimensions * (2 * self.levels + self.coins)

    @property
    def deviation(self) -> float:
        """The standard deviation of a coordinate of the sum that the tosses make."""
        return math.sqrt(self.users * self.coins) / 2 * self.bound / self.levels

    def bits(self, vector_D: Tensor, generator: torch.Generator) -> Tensor:
        """(d,) how many ones a user sends for each coordinate."""
        length = float(vector_D.norm())
        scaled_D = vector_D.double() * (self.levels / max(self.bound, length))
        low_D = scaled_D.floor()
        up_D = torch.rand(scaled_D.shape, generator=generator, dtype=torch.float64) < scaled_D - low_D
        heads_D = torch.binomial(torch.full_like(scaled_D, self.coins), torch.full_like(scaled_D, 0.5), generator)
        return low_D + up_D + self.levels + heads_D

    def total(self, bits_ND: Sequence[Tensor]) -> Tensor:
        """(d,) the unbiased sum of the vectors, out of what the shuffler gives.

        Raises:
            UsageError: another number of users than the privacy was worked out for.
        """
        if len(bits_ND) != self.users:
            got, fix = f"{len(bits_ND)} users", "make a plan with shuffled_sum for as many as there are"
            where = f"{_WHERE}.ShuffledSum.total"
            raise UsageError(word("the sum", got=got, allowed=f"be of {self.users} users", where=where, fix=fix))
        ones_D = torch.stack(list(bits_ND)).sum(0)
        return (ones_D - self.users * (self.levels + self.coins / 2)) * (self.bound / self.levels)


@expects(users=int)
def shuffled_sum(
    users: int, dimensions: int, *, bound: float, eps: float, delta: float, levels: "int | None" = None
) -> ShuffledSum:
    """The fewest coins with which the sum is (eps, delta) differentially private in the shuffle model.

    Neighbours differ in one user's vector, which is replaced. The levels then differ by a vector k of whole numbers,
    |k_j| <= 2 g and |k|_2 <= 2 (g + sqrt(d)). With N = n b, T such that a binomial of N is further than T from its mean
    in some of the d coordinates with chance tau <= delta / 2, and all sums over |z - N/2| <= T,

        R(a) = max over k of 1 / ((a - 1) k^2) log sum_z B(z)^a B(z - k)^(1 - a),
        eps = min over a of R(a) |k|_2^2 + a / (a - 1) log 1 / (1 - tau) + log(2 / delta) / (a - 1).

    That is the Renyi divergence of what is seen, given that no coordinate is in its tail, summed over coordinates, and
    turned into (eps, delta / 2), with tau for the tails: Mironov, 2017, "Renyi Differential Privacy", propositions 1
    and 3. B is the binomial's own probability, not a normal's. It is sound, and looser than the exact trade-off.

    Args:
        users: n, at least 1.
        dimensions: d, at least 1.
        bound: the largest l2 length of a user's vector, above 0.
        eps: of the sum, above 0.
        delta: of the sum, above 0 and below 1.
        levels: g; None takes ceil(4 sqrt(d)), so that rounding adds a quarter to the length.

    Raises:
        UsageError: a number out of range, or a privacy that 2^20 coins a user do not give.

    >>> few, many = (shuffled_sum(n, 4, bound=1.0, eps=1.0, delta=1e-5) for n in (100, 1000))
    >>> few.coins > many.coins
    True

    Source: Cheu, Joseph, Mao & Peng, 2022, "Shuffle Private Stochastic Convex Optimization" (the protocol). Where we
    differ: the accountant is the one above; the paper's theorem has constants for eps, delta and n in ranges of their
    own.
    """
    if not (users >= 1 and dimensions >= 1 and bound > 0 and eps > 0 and 0 < delta < 1 and (levels or 1) >= 1):
        got = f"users={users}, dimensions={dimensions}, bound={bound}, eps={eps}, delta={delta}, levels={levels}"
        allowed, fix = "be positive, delta below 1", "pass eps=1.0, delta=1e-6, bound=1.0"
        raise UsageError(word("the sum", got=got, allowed=allowed, where=f"{_WHERE}.shuffled_sum", fix=fix))
    steps = math.ceil(4 * math.sqrt(dimensions)) if levels is None else levels
    low, high = 0, 1
    while _spent(users * high, dimensions, steps, delta) > eps:
        low, high = high, 2 * high
        if high > 2**20:
            got, fix = f"eps={eps}, delta={delta} with {users} users", "take more users, or a larger eps or delta"
            allowed = "be reached with 2^20 coins a user"
            raise UsageError(word("the privacy", got=got, allowed=allowed, where=f"{_WHERE}.shuffled_sum", fix=fix))
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if _spent(users * middle, dimensions, steps, delta) <= eps else (middle, high)
    spent = _spent(users * high, dimensions, steps, delta)
    return ShuffledSum(users, dimensions, bound, steps, high, spent, delta)


def _spent(tosses: int, dimensions: int, levels: int, delta: float) -> float:
    """Eps of binomial noise of so many tosses in each coordinate."""
    reach = int(binom.isf(delta / (4 * dimensions), tosses, 0.5) - tosses // 2) + 1  # two tails, d coordinates
    tail = 2 * dimensions * float(binom.sf(tosses // 2 + reach, tosses, 0.5))
    furthest = 2 * levels
    if tosses // 2 - reach - furthest < 0 or tail > delta / 2:
        return math.inf  # somebody's bits could be told for certain
    z = np.arange(tosses // 2 - reach, tosses - tosses // 2 + reach + 1)
    at = np.arange(z[0] - furthest, z[-1] + furthest + 1)
    log_p = gammaln(tosses + 1) - gammaln(at + 1) - gammaln(tosses - at + 1) - tosses * math.log(2)
    here, square = log_p[furthest : furthest + len(z)], (2 * (levels + math.sqrt(dimensions))) ** 2
    best = math.inf
    for order in _ORDERS:
        worst = 0.0
        for k in range(1, furthest + 1):
            exponent = order * here + (1 - order) * log_p[furthest - k : furthest - k + len(z)]
            top = float(exponent.max())
            worst = max(worst, (top + math.log(np.exp(exponent - top).sum())) / k**2)
        spent = worst / (order - 1) * square + order / (order - 1) * -math.log1p(-tail)
        best = min(best, spent + math.log(2 / delta) / (order - 1))
    return best


@expects(start_D=Tensor)
def private_sgd(
    start_D: Tensor,
    users: Sequence[User],
    gradient: Callable[[Tensor, User], Tensor],
    *,
    plan: ShuffledSum,
    rate: float,
    radius: float = math.inf,
    seed: int = 0,
) -> Tensor:
    """The mean iterate of mini-batch SGD in which every user's gradient is used once, in a private sum of its batch.

    Each batch is ``plan.users`` users that no other batch has: the whole is as private as one sum, (eps, delta), since
    a user is in one of them and the others only work on what came out before.

    Args:
        start_D: where it begins.
        users: each with data of its own; those left over by whole batches are not asked.
        gradient: from the parameters and a user to (D,); longer ones than ``plan.bound`` are shortened.
        plan: of a batch's sum.
        rate: of the step on the mean gradient, above 0.
        radius: of the ball around the start that iterates are put back into.
        seed: of rounding, tosses and the order of the users.

    Raises:
        UsageError: fewer users than a batch, or a plan of other dimensions.

    >>> plan = shuffled_sum(100, 1, bound=1.0, eps=2.0, delta=1e-4)
    >>> data = [0.5] * 1000
    >>> found = private_sgd(torch.zeros(1), data, lambda x, user: x - user, plan=plan, rate=0.5)
    >>> abs(found.item() - 0.5) < 0.3
    True

    Source: Cheu, Joseph, Mao & Peng, 2022, "Shuffle Private Stochastic Convex Optimization", the sequentially
    interactive protocol.
    """
    if len(users) < plan.users or plan.dimensions != start_D.numel():
        got = f"{len(users)} users and {start_D.numel()} parameters"
        allowed = f"be at least the {plan.users} users of a batch, and {plan.dimensions} parameters"
        fix = "make the plan with shuffled_sum for this batch and these parameters"
        raise UsageError(word("users", got=got, allowed=allowed, where=f"{_WHERE}.private_sgd", fix=fix))
    chance = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(users), generator=chance).tolist()
    at_D, sum_D, batches = start_D.detach().double().flatten(), torch.zeros(start_D.numel()).double(), 0
    begin_D = at_D.clone()
    for first in range(0, len(users) - plan.users + 1, plan.users):
        asked = [users[n] for n in order[first : first + plan.users]]
        sent = [plan.bits(gradient(at_D.to(start_D.dtype), user).detach().flatten(), chance) for user in asked]
        moved_D = at_D - rate * plan.total(sent) / plan.users - begin_D
        at_D = begin_D + moved_D * min(1.0, radius / max(float(moved_D.norm()), 1e-300))
        sum_D, batches = sum_D + at_D, batches + 1
    return (sum_D / batches).to(start_D.dtype).view(start_D.shape)
