"""MoE++: a router that knows experts which compute nothing, and what the router before it thought."""

import dataclasses
from typing import Literal

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import largest, linear, softmax
from turnout.decide.token.linear_gate import LinearGate
from turnout.errors import UsageError, word
from turnout.types import Routing

__all__ = ["MoEPlusPlus"]

_WHERE = "turnout.decide.token.MoEPlusPlus"


class MoEPlusPlus(LinearGate):
    """Top-k over ordinary and zero-computation experts, with the logits of the router before added in.

    l = W x + G l', l' the logits of the routed layer before (none in the first); p = softmax(l); the K largest run.
    Beside the loss it asks for balance * sum_e eta_e f_e P_e, with f_e the share of the tokens that chose e, P_e the
    mean of p_e, and eta_e 1 for ordinary experts and tau for those that compute nothing: the smaller tau, the more
    tokens go there.

    The layer has to have the experts: ``MoEConfig(zero_computation=...)``, or ``turnout.paths.Mixed``.

    Args:
        width: D, of the tokens.
        num_experts: E, all of them, the zero-computation ones last.
        top_k: K, experts per token, 1 to E.
        free: how many of the last experts compute nothing.
        zero: how many of the very last give zero.
        tau: of eta, above 0.
        balance: weight of what it asks for, 0 or more; leave the loop's own ``aux_weight`` at 0.
        residual: whether l' is added.
        weights: "masked", p with that of the zero experts put to 0, over the sum of the K; "sum", p over the sum of the
            K; or "raw", p. Under "masked" a zero expert takes no weight from the other one.
        std: standard deviation of the normal distribution that ``weight`` (E, D) and G (E, E) start from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: free, zero, tau, balance or weights out of range.

    >>> router, x_TD = MoEPlusPlus(4, 8, free=4, zero=1), torch.randn(3, 4)
    >>> router(x_TD, carry_TX=router(x_TD).carry_TX).carry_TX.shape
    torch.Size([3, 8])

    Takes: K experts a token, some of which compute next to nothing; 2 E (D + E) operations a token.

    Source: Jin et al., 2024, "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts". One linear
    map, where their release has two with tanh between; no capacity; experts get x, where the release gives them K x.
    """

    needs_carry = True

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        free: int = 0,
        zero: int = 0,
        tau: float = 0.75,
        balance: float = 0.01,
        residual: bool = True,
        weights: Literal["masked", "sum", "raw"] = "masked",
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(width, num_experts, top_k, std=std, generator=generator)
        if not 0 <= zero <= free < num_experts or not (0 < tau < float("inf") and balance >= 0):
            got, fix = f"{free}, {zero}, {tau} and {balance}", "pass free=4, zero=1, tau=0.75 and balance=0.01"
            allowed = f"be zero <= free < {num_experts}, above 0, and not negative"
            raise UsageError(word("free, zero, tau and balance", got=got, allowed=allowed, where=_WHERE, fix=fix))
        if weights not in ("masked", "sum", "raw"):
            allowed, fix = "be 'masked', 'sum' or 'raw'", "pass weights='masked'"
            raise UsageError(word("weights", got=weights, allowed=allowed, where=_WHERE, fix=fix))
        self.free, self.zero, self.tau, self.balance, self.weights = free, zero, tau, balance, weights
        self.residual = None
        if residual:
            self.residual = nn.Parameter(torch.empty(num_experts, num_experts).normal_(0, std, generator=generator))

    def forward(
        self,
        x_TD: Tensor,
        *,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
        carry_TX: Tensor | None = None,
    ) -> Routing:
        """The routing of these tokens, which carries its logits on; ``token_id_T`` and ``generator`` are not used.

        Args:
            x_TD: (T, D) tokens.
            token_id_T: not used.
            generator: not used.
            carry_TX: (T, E) the logits of the routed layer before; None in the first.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = self.logits(x_TD)
        if self.residual is not None and carry_TX is not None:
            logit_TE = logit_TE + linear(carry_TX, self.residual)
        score_TE = softmax(logit_TE)
        index_TK = largest(score_TE, self.top_k)
        weight_TK = score_TE.gather(1, index_TK)
        if self.weights == "masked":
            weight_TK = weight_TK.masked_fill(index_TK >= self.num_experts - self.zero, 0.0)
        if self.weights != "raw":
            tiny = torch.finfo(weight_TK.dtype).tiny
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp_min(tiny)
        routing = dataclasses.replace(self.taken(index_TK, weight_TK, score_TE, logit_TE), carry_TX=logit_TE)
        if self.balance == 0 or not len(x_TD):
            return routing
        eta_E = score_TE.new_ones(self.num_experts)
        eta_E[self.num_experts - self.free :] = self.tau
        share_E = routing.load_E.to(score_TE.dtype) / len(x_TD)
        return dataclasses.replace(routing, penalty=self.balance * (eta_E * share_E * score_TE.mean(0)).sum())
