"""Softmax over all experts, then the k largest: the router of Mixtral, OLMoE, Qwen-MoE and gpt-oss."""

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import Priority, check, limit, linear, picked, softmax
from turnout.errors import UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["TopK"]


class TopK(Called):
    """Each token takes the k experts with the highest softmax probability.

    p = softmax(W x + b); g_e = p_e for the k largest, or p_e / (their sum) when renormalised.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        renormalize: whether the K weights of a token are scaled to sum to 1 (Mixtral, Qwen3-MoE) or left as they are
            (OLMoE). None renormalises when top_k > 1: with one expert the weight would always be 1, and no gradient
            would reach the router.
        bias: whether the logits have a learned bias b, started at zero (gpt-oss).
        capacity_factor: c > 0 limits every expert to max(1, ceil(c T K / E)) tokens; None drops nothing.
        priority: whom a full expert keeps: "weight" the highest weights, "position" the earliest tokens. Only
            "position" is causal: an earlier token never loses its expert to a later one.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: capacity_factor is not positive, or top_k=1 is renormalised.

    >>> router = TopK(2, 3, top_k=2)
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    >>> router(torch.tensor([[1.0, 0.0], [0.0, 1.0]])).dense()
    tensor([[0.7311, 0.2689, 0.0000],
            [0.2689, 0.7311, 0.0000]], grad_fn=<IndexPutBackward0>)

    Takes: K experts a token; 2 D E operations a token.

    Source: Jiang et al., 2024, "Mixtral of Experts" (renormalised); Muennighoff et al., 2024, "OLMoE" (not). The
    softmax over all experts, renormalised, equals Mixtral's and gpt-oss' softmax over the chosen logits.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        renormalize: bool | None = None,
        bias: bool = False,
        capacity_factor: float | None = None,
        priority: Priority = "weight",
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("TopK", width, num_experts, top_k, capacity_factor, priority)
        if renormalize and top_k == 1:
            raise UsageError(
                word(
                    "renormalize",
                    got=True,
                    allowed="be False or None when top_k=1, where every weight would be 1 and the router never learn",
                    where="turnout.decide.token.TopK",
                    fix="leave renormalize out, or pass top_k=2",
                )
            )
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.renormalize = top_k > 1 if renormalize is None else renormalize
        self.capacity_factor, self.priority = capacity_factor, priority
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE, score_TE = self.scored(x_TD)
        index_TK, weight_TK = self.chosen(score_TE)
        routing = Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=score_TE, logit_TE=logit_TE
        )
        return limit(routing, self.top_k, self.capacity_factor, self.priority)

    def scored(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """As ``turnout.decide.token.gate.ByScore``."""
        logit_TE = linear(x_TD, self.weight, self.bias)
        return logit_TE, softmax(logit_TE)

    def chosen(self, score_TE: Tensor, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """As ``turnout.decide.token.gate.ByScore``."""
        index_TK = picked(score_TE, self.top_k, rank)
        weight_TK = score_TE.gather(1, index_TK)
        if self.renormalize:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        return index_TK, weight_TK

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, renormalize={self.renormalize}"
