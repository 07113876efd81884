"""AGVM: in large batches, modules whose gradients vary more than the first one's step less far."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from turnout.errors import ShapeError, UsageError, word

__all__ = ["AGVM", "over_halves"]

_WHERE = "turnout.train.AGVM"


class AGVM:
    """A factor on the learning rate of each module, from how unlike two halves of the data make its gradient.

    With a and b the gradients of a module's parameters, as one vector, on two halves of a batch (of the ranks),

        phi_i = 1 - cos(a_i, b_i),    f_i <- mu f_i + (1 - mu) sqrt(clip((phi_0 + 1e-6) / (phi_i + 1e-6), 0.5, 10)),

    and a step multiplies module i's rate by f_i: 1 for the first, which is the anchor (the backbone), less for what
    varies more. Where optimizer groups have betas (Adam and its kin) the gradients are first divided by the root of
    their second moment, as the step will.

    Args:
        optimizer: with one parameter group for each module; the group of the anchor is the first.
        every: steps between two looks at the gradients.
        begin: the step, from 0, at which the factors begin to be measured and applied; best after warm-up.
        momentum: mu, from 0 to below 1.

    Raises:
        UsageError: a setting out of range, or an optimizer of fewer than two groups.

    >>> modules = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    >>> groups = [{"params": list(one.parameters())} for one in modules]
    >>> agvm = AGVM(torch.optim.SGD(groups, lr=0.1), momentum=0.0)
    >>> first = [torch.ones(2, 2), torch.ones(2), torch.tensor([[1.0, 0], [0, 0]]), torch.zeros(2)]
    >>> second = [torch.ones(2, 2), torch.zeros(2), torch.tensor([[0.0, 1], [0, 0]]), torch.zeros(2)]
    >>> [round(one, 3) for one in agvm.look(first, second)]  # phi_0 = 0.18, phi_1 = 1: the limit is the root of a half
    [1.0, 0.707]

    Source: Xue et al., 2022, "Large-batch Optimization for Dense Visual Predictions", and its code (AGVM). Where we
    differ: the halves' gradients are given, so that no second process group is made; momentum 0.97, every 5 steps and
    the limits are theirs.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, *, every: int = 5, begin: int = 0, momentum: float = 0.97
    ) -> None:
        if len(optimizer.param_groups) < 2:
            got, fix = f"{len(optimizer.param_groups)} group", 'pass [{"params": ...}, {"params": ...}] to it'
            raise UsageError(word("the optimizer", got=got, allowed="have a group a module", where=_WHERE, fix=fix))
        if every < 1 or begin < 0 or not 0 <= momentum < 1:
            got, fix = f"every={every}, begin={begin}, momentum={momentum}", "leave them as they are"
            allowed = "be at least 1, at least 0, and from 0 to below 1"
            raise UsageError(word("every, begin and momentum", got=got, allowed=allowed, where=_WHERE, fix=fix))
        self.optimizer, self.every, self.begin, self.momentum = optimizer, every, begin, momentum
        self.factors = [1.0] * len(optimizer.param_groups)
        self.phi = [math.nan] * len(optimizer.param_groups)  # of the last look
        self.step_number = 0

    @property
    def looks(self) -> bool:
        """Whether the next step is one at which the halves' gradients are wanted."""
        return self.step_number >= self.begin and (self.step_number - self.begin) % self.every == 0

    @torch.no_grad()
    def look(self, first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> list[float]:
        """Measures phi and moves the factors.

        Args:
            first: the gradients on one half, parameter by parameter in the order of the optimizer's groups.
            second: those on the other; None where a parameter had none.

        Returns:
            The factors.

        Raises:
            ShapeError: gradients that are not those of the optimizer's parameters.
        """
        owned = [one for group in self.optimizer.param_groups for one in group["params"]]
        fits = len(first) == len(second) == len(owned) and all(
            (a is None) == (b is None) and (a is None or b is None or a.shape == b.shape == one.shape)
            for a, b, one in zip(first, second, owned, strict=True)
        )
        if not fits:
            got, allowed = f"{len(first)} and {len(second)}", f"be of the optimizer's {len(owned)} parameters, alike"
            fix = "pass one a parameter: [one.grad for group in optimizer.param_groups for one in group['params']]"
            raise ShapeError(word("the gradients", got=got, allowed=allowed, where=f"{_WHERE}.look", fix=fix))
        self.phi, at = [], 0
        for group in self.optimizer.param_groups:
            end = at + len(group["params"])
            halves = [self._vector(group, half[at:end]) for half in (first, second)]
            self.phi.append(1 - float(torch.nn.functional.cosine_similarity(halves[0], halves[1], dim=0)))
            at = end
        new = [math.sqrt(min(10.0, max(0.5, (self.phi[0] + 1e-6) / (one + 1e-6)))) for one in self.phi]
        self.factors = [self.momentum * f + (1 - self.momentum) * n for f, n in zip(self.factors, new, strict=True)]
        return list(self.factors)

    def step(self) -> None:
        """The optimizer's step, each group's rate times its factor meanwhile."""
        rates = [group["lr"] for group in self.optimizer.param_groups]
        factors = self.factors if self.step_number >= self.begin else [1.0] * len(rates)
        for group, rate, factor in zip(self.optimizer.param_groups, rates, factors, strict=True):
            group["lr"] = rate * factor
        try:
            self.optimizer.step()
        finally:
            for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
        self.step_number += 1

    def _vector(self, group: Mapping[str, Any], gradients: Sequence[Tensor | None]) -> Tensor:
        """A module's gradient as one vector, scaled as an Adam would."""
        parts = [torch.zeros(0, dtype=torch.float64)]
        for one, gradient in zip(group["params"], gradients, strict=True):
            if gradient is None:
                continue
            value, state = gradient.double().cpu(), self.optimizer.state.get(one, {})
            if "betas" in group:
                beta = group["betas"][1]
                square = state["exp_avg_sq"].double().cpu() * beta if "exp_avg_sq" in state else torch.zeros_like(value)
                value = value / ((square + (1 - beta) * value.square()).sqrt() + group["eps"])
            parts.append(value.flatten())
        return torch.cat(parts)


def over_halves(
    gradients: Sequence[Tensor | None], group: "dist.ProcessGroup | None" = None
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The sums of the gradients over the first half of a group's ranks, and over the others; the same on every rank.

    It is one all-reduce of twice the size; the two together are the sum over all.

    Args:
        gradients: this rank's, None where it has none; the same ones on every rank.
        group: of at least two ranks; None is all.

    Raises:
        UsageError: fewer than two ranks.

    >>> over_halves([torch.ones(2)])
    Traceback (most recent call last):
    turnout.errors.UsageError: the process group must have at least two ranks in turnout.train.agvm.over_halves; got...

    Source: Xue et al., 2022, "Large-batch Optimization for Dense Visual Predictions". Where we differ: they make a
    process group of each half.
    """
    world = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if world < 2:
        allowed, fix = "have at least two ranks", "start with torchrun --nproc-per-node 2 or more"
        where = "turnout.train.agvm.over_halves"
        raise UsageError(word("the process group", got=world, allowed=allowed, where=where, fix=fix))
    side = int(dist.get_rank(group) >= world // 2)
    both = [None if one is None else torch.stack([one * (side == 0), one * (side == 1)]) for one in gradients]
    for one in both:
        if one is not None:
            dist.all_reduce(one, group=group)
    return [None if one is None else one[0] for one in both], [None if one is None else one[1] for one in both]
