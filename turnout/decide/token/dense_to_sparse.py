"""Dense to sparse: a gate that begins with all experts and, as its temperature falls, ends with a few."""

from collections.abc import Callable
from typing import Literal, Self

import torch
from torch import Tensor, nn

from turnout.decide.token.correction import in_fp32, refuse_evaluation
from turnout.decide.token.gate import check, draw, largest, linear, softmax
from turnout.errors import UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["DenseToSparse"]


class DenseToSparse(Called):
    """Each token takes every expert whose gate is above a threshold; a falling temperature makes them fewer.

    g = softmax((W x + c n) / tau), n ~ Gumbel(0, 1) elementwise in training and 0 otherwise; a token takes the experts
    with g_e > threshold (the largest g_e always), each with weight softmax(W x)_e. After optimizer step s of ``steps``
    tau = start (end / start)^(s / steps), or start + (end - start) s / steps; from step ``steps`` on it is ``end``, and
    a token takes at most its ``top_k`` largest. How many it takes before that, also in evaluation, is up to tau.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, the most experts that a token takes once the annealing is over, 1 to E; E leaves it to the threshold.
        start: the temperature at the beginning, above 0.
        end: the temperature at the end, above 0, at most ``start``.
        steps: how many optimizer steps lie between, at least 1.
        schedule: "exponential" or "linear".
        threshold: which gates are too small to count, in [0, 1).
        noise: c, 0 or more. With 1 the one expert of a cold gate is drawn from softmax(W x), also when the annealing is
            over; with 0, which did better in the claim, nothing is drawn.
        weights: "softmax" weighs with softmax(W x), without noise and temperature; "gate" with g itself, which after
            training with noise is another number than before.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: temperatures, steps, schedule or threshold out of range.

    >>> router = DenseToSparse(4, 8, top_k=1, steps=2).eval()
    >>> x_TD = torch.ones(3, 4)
    >>> before = router(x_TD).num_entries
    >>> for _ in range(2):
    ...     router.train().after_step(torch.zeros(8))
    >>> before, router.eval()(x_TD).num_entries, round(router.temperature, 3)
    (24, 3, 0.3)

    Takes: any number of experts a token, fewer and fewer; 2 D E operations a token.

    Source: Nie et al., 2021, "EvoMoE: An Evolutional Mixture-of-Experts Training Framework via Dense-To-Sparse Gate".
    Threshold, schedules, weights ("softmax" by default) and the switch to few experts as in the published code, where a
    step number of its own decides on the switch, and evaluation always takes one expert. Its default temperatures are
    1 and 0.5; its weighted layer, always dense, has no noise. ``done``, the steps so far, is kept in fp32.
    """

    done: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        start: float = 2.0,
        end: float = 0.3,
        steps: int = 1000,
        schedule: Literal["exponential", "linear"] = "exponential",
        threshold: float = 0.001,
        noise: float = 1.0,
        weights: Literal["softmax", "gate"] = "softmax",
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("DenseToSparse", width, num_experts, top_k, None)
        _check(start, end, steps, schedule, threshold, weights)
        if not 0 <= noise < float("inf"):
            where, fix = "turnout.decide.token.DenseToSparse", "pass noise=1.0, or noise=0.0"
            raise UsageError(word("noise", got=noise, allowed="not be negative", where=where, fix=fix))
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.start, self.end, self.steps, self.schedule, self.threshold = start, end, steps, schedule, threshold
        self.noise, self.weights = noise, weights
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))
        self.register_buffer("done", torch.zeros((), dtype=torch.float32))

    @property
    def temperature(self) -> float:
        """tau, as the next batch is routed with."""
        return float(self._tau())

    def _tau(self) -> Tensor:
        share = (self.done / self.steps).clamp(0, 1)
        if self.schedule == "linear":
            return self.start + (self.end - self.start) * share
        return self.start * (self.end / self.start) ** share

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; in training, ``generator`` draws the noise. ``token_id_T`` is not used.

        ``logit_TE`` of the result is W x without the noise; ``score_TE`` is g.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = noisy_TE = linear(x_TD, self.weight)
        if self.training and self.noise > 0:
            tiny = torch.finfo(logit_TE.dtype).tiny
            exponential_TE = -draw(torch.rand, logit_TE, generator).clamp_min(tiny).log()
            noisy_TE = logit_TE - self.noise * exponential_TE.clamp_min(tiny).log()
        gate_TE = softmax(noisy_TE / self._tau())
        index_TK = largest(gate_TE, self.top_k)
        few_TE = torch.zeros_like(gate_TE, dtype=torch.bool).scatter_(1, index_TK, True)
        keep_TE = (gate_TE > self.threshold) & (few_TE | (self.done < self.steps))
        keep_TE = keep_TE.scatter(1, index_TK[:, :1], True)
        expert_R, token_R = keep_TE.t().nonzero(as_tuple=True)
        return Routing.from_entries(
            token_R,
            expert_R,
            (gate_TE if self.weights == "gate" else softmax(logit_TE))[token_R, expert_R],
            num_tokens=len(x_TD),
            num_experts=self.num_experts,
            score_TE=gate_TE,
            logit_TE=logit_TE,
        )

    def after_step(self, load_E: Tensor) -> None:
        """Counts one step; the training loop calls it once per optimizer step. The load does not matter.

        Raises:
            UsageError: the router is in evaluation mode.
        """
        refuse_evaluation(self.training)
        self.done.add_(1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.done
        super()._apply(fn, recurse)
        self.done = in_fp32(before, self.done)
        return self

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return (
            f"{self.width}, {self.num_experts}, top_k={self.top_k}, start={self.start}, end={self.end}, "
            f"steps={self.steps}, schedule={self.schedule!r}, threshold={self.threshold}"
        )


def _check(start: float, end: float, steps: int, schedule: str, threshold: float, weights: str) -> None:
    where = "turnout.decide.token.DenseToSparse"
    if not 0 < end <= start < float("inf"):
        allowed, fix = "be positive and finite, end at most start", "pass start=2.0, end=0.3"
        raise UsageError(word("start and end", got=f"{start} and {end}", allowed=allowed, where=where, fix=fix))
    if not isinstance(steps, int) or steps < 1:
        allowed, fix = "be a whole number of at least 1", "pass about half of the run's steps"
        raise UsageError(word("steps", got=steps, allowed=allowed, where=where, fix=fix))
    if schedule not in ("exponential", "linear"):
        allowed, fix = "be 'exponential' or 'linear'", "pass schedule='exponential'"
        raise UsageError(word("schedule", got=schedule, allowed=allowed, where=where, fix=fix))
    if not 0 <= threshold < 1:
        raise UsageError(
            word("threshold", got=threshold, allowed="be in [0, 1)", where=where, fix="pass threshold=0.001")
        )
    if weights not in ("softmax", "gate"):
        allowed, fix = "be 'softmax' or 'gate'", "pass weights='softmax'"
        raise UsageError(word("weights", got=weights, allowed=allowed, where=where, fix=fix))
