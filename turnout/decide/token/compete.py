"""CompeteSMoE: now and then all experts run, those with the strongest outputs win, and the router learns who."""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from turnout.decide.token.correction import refuse_evaluation
from turnout.decide.token.gate import draw, largest, softmax
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import UsageError, word
from turnout.types import Routing

__all__ = ["CompeteSMoE"]

_WHERE = "turnout.decide.token.CompeteSMoE"


class CompeteSMoE(LinearGate):
    """In a competition step each token takes the k experts with the longest outputs; in others the router's k best.

    Competition: s_te = |E_e(x_t)|, all E experts being run; J = the K largest; g = softmax of s over J. Beside the loss
    it asks for distil * mean over (t, e) of (r_te - sg q_te)^2, with r = softmax(W x) and q = softmax of s over J and 0
    elsewhere, and for balance * E sum_e f_e mean_t softmax(s)_te. Routing: J = the K largest of W x; g = softmax of
    their logits. A step is a competition with probability 2 / (2 + sqrt(1 + steps done / 1000)), or ``share``;
    evaluation never is.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        share: the probability, in [0, 1]; None for the falling one.
        distil: weight of the first, 0 or more.
        balance: weight of the second, 0 or more.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: share or a weight out of range.

    >>> router = CompeteSMoE(2, 3, top_k=1, share=1.0)
    >>> outputs = lambda x_TD: torch.tensor([[[1.0, 0.0], [3.0, 4.0], [0.0, 2.0]]])
    >>> router(torch.zeros(1, 2), experts=outputs).expert_R.tolist()
    [1]

    Takes: K experts a token; 2 D E operations a token; in a step of competition all E experts run.

    Source: Pham et al., 2024, "CompeteSMoE: Effective Training of Sparse Mixture of Experts via Competition". The draw
    is the loop's, so it is the same when a run is resumed; the target has no gradient, and is in the experts' order
    (their first code compares it with one in the order of torch.topk).
    """

    needs_experts = True
    done: Tensor

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        share: float | None = None,
        distil: float = 5.0,
        balance: float = 0.01,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        if not (0 <= (0 if share is None else share) <= 1 and distil >= 0 and balance >= 0):
            got, fix = f"{share}, {distil} and {balance}", "pass share=None, distil=5.0 and balance=0.01"
            allowed = "be in [0, 1] or None, and not negative"
            raise UsageError(word("share, distil and balance", got=got, allowed=allowed, where=_WHERE, fix=fix))
        self.share, self.distil, self.balance = share, distil, balance
        self.register_buffer("done", torch.zeros((), dtype=torch.int64))

    def forward(
        self,
        x_TD: Tensor,
        *,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        experts: Callable[[Tensor], Tensor] | None = None,
    ) -> Routing:
        """The routing of these tokens; in training ``generator`` draws whether they compete.

        Args:
            x_TD: (T, D) tokens.
            token_id_T: not used.
            generator: draws.
            experts: (T, D) -> (T, E, D) what every expert makes of tokens; needed in a competition.

        Raises:
            ShapeError: x_TD is not (T, width).
            UsageError: a competition without experts.
        """
        logit_TE = self.logits(x_TD)
        share = 2 / (2 + (1 + int(self.done) / 1000) ** 0.5) if self.share is None else self.share
        if self.training and float(draw(torch.rand, logit_TE.new_empty(1), generator)) < share:
            return self._competition(x_TD, logit_TE, experts)
        index_TK = largest(logit_TE, self.top_k)
        weight_TK = logit_TE.gather(1, index_TK).softmax(1)
        return self.taken(index_TK, weight_TK, softmax(logit_TE), logit_TE)

    def _competition(self, x_TD: Tensor, logit_TE: Tensor, experts: Callable[[Tensor], Tensor] | None) -> Routing:
        if experts is None:
            fix = "put the router into a turnout.layers.MoE"
            raise UsageError(word("experts", got=None, allowed="be there to compete", where=_WHERE, fix=fix))
        length_TE = experts(x_TD).to(logit_TE.dtype).norm(dim=2)
        index_TK = largest(length_TE, self.top_k)
        weight_TK = length_TE.gather(1, index_TK).softmax(1)
        score_TE = softmax(logit_TE)
        routing = self.taken(index_TK, weight_TK, score_TE, logit_TE)
        if not len(x_TD):
            return routing
        target_TE = torch.zeros_like(score_TE).scatter(1, index_TK, weight_TK.detach())
        apart = (score_TE - target_TE).square().mean()
        share_E = routing.load_E.to(score_TE.dtype) / (self.top_k * len(x_TD))
        even = self.num_experts * (share_E * softmax(length_TE).mean(0)).sum()
        return dataclasses.replace(routing, penalty=self.distil * apart + self.balance * even)

    def after_step(self, load_E: Tensor) -> None:
        """Counts one step; the training loop calls it once per optimizer step. The load does not matter.

        Raises:
            UsageError: the router is in evaluation mode.
        """
        refuse_evaluation(self.training)
        self.done.add_(1)
