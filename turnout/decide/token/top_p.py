"""Top-p: as many experts as a share of the probability needs."""

import dataclasses
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from turnout.decide.token.correction import in_fp32, refuse_evaluation
from turnout.decide.token.gate import largest, softmax
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import UsageError, word
from turnout.types import Routing

__all__ = ["TopP"]


class TopP(LinearGate):
    """Each token takes the most probable experts until their probabilities sum to more than P.

    p = softmax(W x), largest first; an expert is taken iff those before it sum to at most P, so one is at least, and
    g_e = p_e, not renormalised. Beside the loss it asks for entropy * mean over tokens of -sum p log p, without which a
    router would rather flatten p and take everything.

    With a ``rate``, P is moved after each optimizer step so that a token takes ``top_k`` experts in the mean: down by
    rate where it took more, up where it took less, within [0, 1].

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, how many experts a token takes in the mean, 1 to E; only a ``rate`` sees to it.
        threshold: P, in [0, 1]; 0 is top-1, 1 takes all.
        rate: how far P moves a step, 0 or more; 0 leaves it.
        entropy: weight of the entropy, 0 or more.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: threshold, rate or entropy out of range.

    >>> router = TopP(2, 3, threshold=0.6)
    >>> _ = router.weight.data.copy_(torch.tensor([[0.5, 0.0], [0.3, 0.0], [0.2, 0.0]]).log().nan_to_num(0, 0, 0))
    >>> router(torch.tensor([[1.0, 0.0]])).expert_R.tolist()
    [0, 1]

    Takes: any number of experts a token, 1 at least; 2 D E operations a token.

    Source: Huang et al., 2024, "Harder Tasks Need More Experts: Dynamic Routing in MoE Models". Moving P to a budget is
    ours; ``threshold_now`` stays in fp32 whatever the module is cast to, and in checkpoints.
    """

    threshold_now: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        threshold: float = 0.4,
        rate: float = 0.0,
        entropy: float = 1e-4,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        if not (0 <= threshold <= 1 and 0 <= rate < float("inf") and 0 <= entropy < float("inf")):
            got, allowed = f"{threshold}, {rate} and {entropy}", "be in [0, 1], and not negative"
            where, fix = "turnout.decide.token.TopP", "pass threshold=0.4, rate=0.0 and entropy=1e-4"
            raise UsageError(word("threshold, rate and entropy", got=got, allowed=allowed, where=where, fix=fix))
        self.threshold, self.rate, self.entropy = threshold, rate, entropy
        self.register_buffer("threshold_now", torch.tensor(threshold, dtype=torch.float32))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = self.logits(x_TD)
        score_TE = softmax(logit_TE)
        index_TE = largest(score_TE, self.num_experts)
        sorted_TE = score_TE.detach().gather(1, index_TE)
        before_TE = sorted_TE.cumsum(1) - sorted_TE
        taken_TE = before_TE <= self.threshold_now
        taken_TE = torch.zeros_like(taken_TE).scatter_(1, index_TE, taken_TE)
        routing = Routing.from_dense(score_TE, mask_TE=taken_TE)
        routing = dataclasses.replace(routing, score_TE=score_TE, logit_TE=logit_TE)
        if self.entropy == 0:
            return routing
        entropy = -(score_TE * logit_TE.log_softmax(1)).sum() / max(len(x_TD), 1)
        return dataclasses.replace(routing, penalty=self.entropy * entropy)

    def after_step(self, load_E: Tensor, *, num_tokens: int) -> None:
        """Moves P by one step; the training loop calls it once per optimizer step.

        Args:
            load_E: (E,) the tokens that took each expert, summed over the step's batches and ranks.
            num_tokens: how many tokens the step had.

        Raises:
            UsageError: the router is in evaluation mode.
        """
        refuse_evaluation(self.training)
        over = load_E.sum().to(self.threshold_now.device) - num_tokens * self.top_k
        self.threshold_now.sub_(self.rate * over.sign()).clamp_(0, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = self.threshold_now
        super()._apply(fn, recurse)
        self.threshold_now = in_fp32(before, self.threshold_now)
        return self
