"""Routing by sparsity-constrained transport: even loads, and at most k experts a token, from one plan."""

import dataclasses

import torch
from torch import Tensor

from turnout.decide.token.gate import softmax
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import UsageError, word
from turnout.types import Routing
from turnout.types.invariant import refuse_invariant

__all__ = ["SparseTransport"]


class SparseTransport(LinearGate):
    """Each token takes the at most k experts of its column of a plan that gives every expert an equal share.

    S = softmax(W x); alpha_e maximises <alpha, T/E> - sum_t max over p in the k-sparse simplex of (<p, alpha + S_t> -
    gamma/2 |p|^2), by ``iterations`` steps of Adam from 0; token t takes the entries of its p, with weight S_te, or p
    itself with ``plan_weights``, through which no gradient goes to W.

    **It leaks the future**, in evaluation too: alpha depends on all tokens of the call.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: k, the most experts a token takes, 1 to E.
        gamma: above 0: the larger, the more even a token's entries.
        iterations: of the solver, at least 0. The paper's 20 steps of 0.01 move alpha by 0.2 at most: a router that
            prefers an expert by more stays uneven.
        rate: of its steps, above 0.
        plan_weights: whether weights are the plan's.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: gamma, iterations or rate out of range.

    >>> router = SparseTransport(1, 2, top_k=1, iterations=100)
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0], [0.0]]))
    >>> router(torch.tensor([[1.0], [2.0], [3.0], [4.0]])).load_E.tolist()
    [2, 2]

    Takes: up to K experts a token, an equal share an expert; 2 D E operations a token, and a plan of T by E.

    Source: Liu, Puigcerver & Blondel, 2023, "Sparsity-Constrained Optimal Transport", as the router of their vision
    experiments (tokens choose, gamma 1, combine weights S).
    """

    sees_later_tokens = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        gamma: float = 1.0,
        iterations: int = 20,
        rate: float = 0.01,
        plan_weights: bool = False,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        if not (0 < gamma < float("inf") and iterations >= 0 and 0 < rate < float("inf")):
            got, allowed = f"{gamma}, {iterations} and {rate}", "be above 0, at least 0, and above 0"
            where, fix = "turnout.decide.token.SparseTransport", "pass gamma=1.0, iterations=20 and rate=0.01"
            raise UsageError(word("gamma, iterations and rate", got=got, allowed=allowed, where=where, fix=fix))
        self.gamma, self.iterations, self.rate, self.plan_weights = gamma, iterations, rate, plan_weights

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        refuse_invariant("a plan of all tokens", "SparseTransport", "take a router whose tokens choose alone: TopK")
        logit_TE = self.logits(x_TD)
        score_TE = softmax(logit_TE)
        plan_TE = self.plan(score_TE)
        routing = Routing.from_dense(plan_TE if self.plan_weights else score_TE, mask_TE=plan_TE > 0)
        return dataclasses.replace(routing, score_TE=score_TE, logit_TE=logit_TE)

    @torch.no_grad()
    def plan(self, score_TE: Tensor) -> Tensor:
        """(T, E) the plan for these scores: rows of sum 1 with at most k entries."""
        gain_TE = score_TE.detach()
        tokens, experts = gain_TE.shape
        alpha_E, first_E, second_E = (gain_TE.new_zeros(experts) for _ in range(3))
        if not tokens:
            return gain_TE
        for step in range(1, self.iterations + 1):
            # Per token, so that the step does not depend on how many there are but by Adam's epsilon.
            slope_E = _projected((gain_TE + alpha_E) / self.gamma, self.top_k).mean(0) - 1 / experts
            first_E = 0.9 * first_E + 0.1 * slope_E
            second_E = 0.999 * second_E + 0.001 * slope_E.square()
            step_E = first_E / (1 - 0.9**step) / ((second_E / (1 - 0.999**step)).sqrt() + 1e-8)
            alpha_E = alpha_E - self.rate * step_E
        return _projected((gain_TE + alpha_E) / self.gamma, self.top_k)


def _projected(x_TE: Tensor, k: int) -> Tensor:
    """(T, E) the nearest points of the simplex with at most k entries; of equal ones the lower index."""
    sorted_TE, index_TE = x_TE.sort(dim=1, descending=True, stable=True)
    top_TK, index_TK = sorted_TE[:, :k], index_TE[:, :k]
    rank_K = torch.arange(1, k + 1, device=x_TE.device)
    level_TK = (top_TK.cumsum(1) - 1) / rank_K
    count_T1 = (top_TK > level_TK).sum(1, keepdim=True).clamp_min(1)
    return torch.zeros_like(x_TE).scatter(1, index_TK, (top_TK - level_TK.gather(1, count_T1 - 1)).clamp_min(0))
