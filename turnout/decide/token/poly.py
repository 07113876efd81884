"""Poly and MHR: a table says how much of each adapter a task takes; with heads, how much of each part of it."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, draw
from turnout.errors import ShapeError, UsageError, word
from turnout.types import Given, Routing
from turnout.types.called import Called

__all__ = ["Poly"]

_WHERE = "turnout.decide.token.Poly"
_TINY = 1e-12


class Poly(Called):
    """Each sequence takes all adapters, their *parameters* averaged with the weights of its task; tokens do not matter.

    Task t has a row Z_ts (E,) of logits for each of ``parts`` equal parts of the adapters: w_ts = s / (sum s + 1e-12),
    with s = sigmoid(Z_ts). In training s is drawn anew for every sequence, s = sigmoid(Z_ts + log u - log(1 - u)) with
    u uniform: a relaxed Bernoulli variable of temperature 1. One part is Poly; more are MHR, multi-head routing.

    The task of each sequence is what ``turnout.layers.given(task_B=...)`` says.

    Args:
        width: D, of the tokens; a multiple of ``parts``, and not used beyond that check.
        num_experts: E, the adapters.
        num_tasks: how many tasks there are, at least 1.
        parts: how many parts of an adapter have weights of their own, at least 1; it must divide the output's width
            too, which the layer checks.
        unknown: what a task outside [0, num_tasks), or none given, means when not training: "refuse", or "average",
            the same weight for all adapters.
        generator: where the starting logits' chance comes from; torch's default when None. They are uniform within
            1e-3 of 0.

    Raises:
        ShapeError: a size is below 1, or parts does not divide width.
        UsageError: another word for ``unknown``.

    >>> router = Poly(4, 2, num_tasks=3, parts=2).eval()
    >>> _ = router.logit.data[1, 0].copy_(torch.tensor([20.0, -20.0]))
    >>> router(torch.zeros(3, 4), given=Given.of(1, 3, task_B=torch.tensor([1]))).dense().round(decimals=2).tolist()
    [[1.0, 0.0], [0.5, 0.5]]

    Takes: all adapters a sequence, averaged; none.

    Source: Ponti et al., 2023, "Combining Modular Skills in Multitask Learning" (Poly); Caccia et al., 2023,
    "Multi-Head Adapter Routing for Cross-Task Generalization" (MHR). There an unknown task without leave is an error of
    the lookup, or the last row.
    """

    parts = 1  # a router of sequences: so many rows of the routing each

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        num_tasks: int = 1,
        parts: int = 1,
        unknown: Literal["refuse", "average"] = "refuse",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("Poly", width, num_experts, 1, None)
        if min(num_tasks, parts) < 1 or width % max(parts, 1):
            got, allowed = f"{num_tasks} and {parts}", f"be at least 1, and parts a divisor of {width}"
            fix = "pass the number of tasks, and parts=1 for Poly or such as 4 for MHR"
            raise ShapeError(word("num_tasks and parts", got=got, allowed=allowed, where=_WHERE, fix=fix))
        if unknown not in ("refuse", "average"):
            allowed, fix = "be 'refuse' or 'average'", "pass unknown='refuse'"
            raise UsageError(word("unknown", got=unknown, allowed=allowed, where=_WHERE, fix=fix))
        self.width, self.num_experts, self.parts, self.unknown = width, num_experts, parts, unknown
        self.logit = nn.Parameter(_start(num_tasks, parts, num_experts, generator))

    @property
    def num_tasks(self) -> int:
        """How many tasks have logits."""
        return self.logit.shape[0]

    def forward(
        self,
        x_TD: Tensor,
        *,
        given: Given,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The routing of ``given.num_sequences * parts`` rows over the adapters; ``generator`` draws what is sampled.

        Raises:
            UsageError: a task that has no logits, or none given.
        """
        task_B, known_B = self._tasks(given)
        logit_BSE = self.logit[task_B].to(torch.promote_types(self.logit.dtype, torch.float32))
        logit_BSE = logit_BSE * known_B[:, None, None]
        taken_BSE = logit_BSE
        if self.training:
            noise_BSE = draw(torch.rand, logit_BSE.detach(), generator).clamp(_TINY, 1 - 1e-7)
            taken_BSE = logit_BSE + noise_BSE.log() - (-noise_BSE).log1p()
        weight_BSE = _weights(taken_BSE)
        routing = Routing.from_dense(weight_BSE.flatten(0, 1), mask_TE=torch.ones_like(weight_BSE.flatten(0, 1)).bool())
        logit_XE = logit_BSE.flatten(0, 1)
        return dataclasses.replace(routing, score_TE=_weights(logit_XE), logit_TE=logit_XE)

    def weights(self, task: int) -> Tensor:
        """(S, E) what this task takes of each adapter, for each part, when nothing is drawn.

        Raises:
            UsageError: the task has no logits.
        """
        if not 0 <= task < self.num_tasks:
            raise self._unknown([task])
        return _weights(self.logit[task].float())

    def add_tasks(self, count: int = 1, *, generator: torch.Generator | None = None) -> range:
        """Gives ``count`` new tasks logits near 0; what they are called. Optimisers must be made anew after that."""
        fresh = _start(count, self.parts, self.num_experts, generator).to(self.logit)
        before = self.num_tasks
        self.logit = nn.Parameter(torch.cat((self.logit.detach(), fresh)), self.logit.requires_grad)
        return range(before, self.num_tasks)

    def _tasks(self, given: Given) -> tuple[Tensor, Tensor]:
        """(B,) the row of each sequence's task, and whether it has one."""
        average = self.unknown == "average" and not self.training
        if given.task_B is None and average:
            nothing_B = given.sequence_T.new_zeros(given.num_sequences)
            return nothing_B, nothing_B.bool()
        task_B = given.need("task_B", _WHERE).long()
        known_B = (task_B >= 0) & (task_B < self.num_tasks)
        if not average and not bool(known_B.all()):
            raise self._unknown(sorted(set(task_B[~known_B].tolist())))
        return torch.where(known_B, task_B, 0), known_B

    def _unknown(self, tasks: list[int]) -> UsageError:
        got = ", ".join(map(str, tasks))
        fix = "pass known tasks, give the task logits with turnout.reshape.add_tasks, or attach with unknown='average'"
        allowed = f"be in [0, {self.num_tasks})" + " while it is trained" * self.training
        return UsageError(word("task_B", got=got, allowed=allowed, where=_WHERE, fix=fix))

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, num_tasks={self.num_tasks}, parts={self.parts}"


def _start(num_tasks: int, parts: int, num_experts: int, generator: torch.Generator | None) -> Tensor:
    return torch.empty(num_tasks, parts, num_experts).uniform_(-1e-3, 1e-3, generator=generator)


def _weights(logit: Tensor) -> Tensor:
    """Sigmoids that sum to one over the last axis."""
    taken = logit.sigmoid()
    return taken / (taken.sum(-1, keepdim=True) + _TINY)
