"""Sinkhorn: in training the choice is that of a transport plan whose columns are even."""

import torch
from torch import Tensor

from turnout.decide.token.gate import largest, sigmoid, softmax
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import UsageError, word
from turnout.solve.sinkhorn import sinkhorn
from turnout.types import Routing
from turnout.types.invariant import refuse_invariant

__all__ = ["Sinkhorn"]


class Sinkhorn(LinearGate):
    """In training each token takes the k largest of its row of a balanced plan; in evaluation of its own logits.

    The plan has rows and columns of equal sums and is nearest to softmax(W x) (``turnout.solve.sinkhorn``); no gradient
    goes through it. g_e = sigmoid((W x)_e) where K is 1, else softmax(W x)_e over all experts, not renormalised. The
    load in training is nearly even without a loss for it; a balance loss is not wanted beside.

    **In training it leaks the future**: what a token's row of the plan is depends on all other tokens of the batch.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E. The plan is made for one.
        temperature: of the plan, above 0; towards 0 its choice becomes exactly even (``BASE``).
        iterations: the most scalings of the plan.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: temperature or iterations out of range.

    >>> router = Sinkhorn(2, 2, top_k=1)
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    >>> x_TD = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> router(x_TD).load_E.tolist(), router.eval()(x_TD).load_E.tolist()
    ([1, 1], [2, 0])

    Takes: K experts a token; 2 D E operations a token, in training a plan of T by E too.

    Source: Clark et al., 2022, "Unified Scaling Laws for Routed Language Models" (S-BASE, there with a capacity of 2 in
    evaluation); weights as in Megatron-LM, whose iteration has no limit and overflows above logits of 88.
    """

    sees_later_tokens = "training"

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        temperature: float = 1.0,
        iterations: int = 100,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        if not 0 < temperature < float("inf") or iterations < 1:
            got, allowed = f"{temperature} and {iterations}", "be above 0, and at least 1"
            where, fix = "turnout.decide.token.Sinkhorn", "pass temperature=1.0 and iterations=100"
            raise UsageError(word("temperature and iterations", got=got, allowed=allowed, where=where, fix=fix))
        self.temperature, self.iterations = temperature, iterations

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = self.logits(x_TD)
        score_TE = sigmoid(logit_TE) if self.top_k == 1 else softmax(logit_TE)
        by_TE = logit_TE
        if self.training:
            refuse_invariant("a plan of all tokens", "Sinkhorn", "call eval() first")
            by_TE = sinkhorn(logit_TE, temperature=self.temperature, iterations=self.iterations)
        index_TK = largest(by_TE, self.top_k)
        return self.taken(index_TK, score_TE.gather(1, index_TK), score_TE, logit_TE)
