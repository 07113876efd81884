"""ReMoE: a ReLU decides who runs, and a penalty that follows the sparsity decides how many."""

import dataclasses
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from turnout.decide.token.correction import in_fp32, refuse_evaluation
from turnout.decide.token.gate import linear
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import UsageError, word
from turnout.types import Routing

__all__ = ["ReMoE"]


class ReMoE(LinearGate):
    """Each token takes every expert whose logit is above 0, with the logit as its weight.

    r = relu(W x), neither softmax nor normalisation: the layer's output is a continuous function of x. A token may have
    any number of experts, also none. Beside the loss it asks for R = lambda E sum_e f_e mean_t r_te, with
    f_e = (1 / (K T)) sum_t 1[r_te > 0] outside the gradient; after each optimizer step lambda is multiplied with alpha
    if fewer than 1 - K / E of the entries were 0, and divided by it otherwise. So the mean number of experts comes to K
    and stays about it; the first hundred steps or so are dense.

    Args:
        width: D, of the tokens; expected to be normed, or their scale decides how many experts run.
        num_experts: E.
        top_k: K, the mean number of experts a token to come to, 1 to E.
        start: lambda before the first step, above 0. From 1e-8 it takes 1.2^100 to matter; 1e-5 suits a few hundred
            steps.
        rate: alpha, above 1.
        bias: whether the logits have a learned bias, started at zero. Without one, tokens that have much in common are
            hard to turn away: lambda may overshoot until nothing runs.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: start or rate out of range.

    >>> router = ReMoE(2, 3, top_k=1)
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, -1.0]]))
    >>> router(torch.tensor([[1.0, 3.0], [-1.0, -1.0]])).dense().tolist()
    [[1.0, 6.0, 0.0], [0.0, 0.0, 2.0]]

    Takes: any number of experts a token, K in the mean; 2 D E operations a token.

    Source: Wang et al., 2024, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing". One lambda for each
    layer, where theirs is one for the model; it stays in fp32 whatever the module is cast to, and in checkpoints.
    """

    strength: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        start: float = 1e-8,
        rate: float = 1.2,
        bias: bool = False,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        if not (0 < start < float("inf") and 1 < rate < float("inf")):
            allowed, fix = "be above 0 and above 1", "pass start=1e-8 and rate=1.2"
            where = "turnout.decide.token.ReMoE"
            raise UsageError(word("start and rate", got=f"{start} and {rate}", allowed=allowed, where=where, fix=fix))
        self.start, self.rate = start, rate
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        self.register_buffer("strength", torch.tensor(start, dtype=torch.float32))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = self.logits(x_TD)
        score_TE = logit_TE.relu()
        routing = Routing.from_dense(score_TE, mask_TE=score_TE > 0)
        count = max(len(x_TD), 1)
        share_E = routing.load_E.to(score_TE.dtype) / (self.top_k * count)
        penalty = self.strength * self.num_experts * (share_E * score_TE.sum(0) / count).sum()
        return dataclasses.replace(routing, score_TE=score_TE, logit_TE=logit_TE, penalty=penalty)

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) W x + b, in fp32 at least."""
        return linear(x_TD, self.weight, self.bias)

    def after_step(self, load_E: Tensor, *, num_tokens: int) -> None:
        """Moves lambda by one step; the training loop calls it once per optimizer step.

        Args:
            load_E: (E,) the tokens that took each expert, summed over the step's batches and ranks.
            num_tokens: how many tokens the step had.

        Raises:
            UsageError: the router is in evaluation mode.
        """
        refuse_evaluation(self.training)
        # Entries against K a token, in whole numbers: sparser than wanted, or not.
        dense = load_E.sum().to(self.strength.device) > num_tokens * self.top_k
        self.strength.mul_(torch.where(dense, self.rate, 1 / self.rate))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.strength
        super()._apply(fn, recurse)
        self.strength = in_fp32(before, self.strength)
        return self
