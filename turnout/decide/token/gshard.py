"""GShard: two experts a token, the second kept by chance in proportion to its weight."""

import dataclasses

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import capacity, check, draw, linear, picked, refuse_capacity, softmax
from turnout.errors import ShapeError, UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["GShard"]


class GShard(Called):
    """Each token takes its two most probable experts; in training the second is skipped when it hardly counts.

    p = softmax(W x); g1, g2 = the two largest, divided by their sum; the second is kept when 2 g2 > u, u ~ U(0, 1),
    so with probability min(1, 2 g2). Outside training it is always kept.

    Args:
        width: D, of the tokens.
        num_experts: E, at least 2.
        top_k: 2; taken so that all routers are built alike.
        capacity_factor: c > 0 limits every expert to max(1, ceil(2 c T / E)) tokens, first choices before second ones
            and earlier tokens before later ones (the paper's is c = 1); None drops nothing.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: fewer than two experts, or a width below 1.
        UsageError: top_k is not 2, or capacity_factor is not positive.

    >>> router = GShard(2, 3).eval()
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0]]))
    >>> router(torch.tensor([[1.0, 0.0]])).dense()
    tensor([[0.7311, 0.2689, 0.0000]], grad_fn=<IndexPutBackward0>)

    Takes: 2 experts a token, in training sometimes 1; 2 D E operations a token.

    Source: Lepikhin et al., 2020, "GShard", algorithm 2. The weights of a token whose second expert is skipped or
    dropped are not scaled up again, as there. A skipped second choice takes no place in its expert, as in the
    authors' code; one group of tokens; dropless by default. The paper's auxiliary loss counts first choices alone,
    ``turnout.train.load_balance_loss`` both.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        capacity_factor: float | None = None,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        where = "turnout.decide.token.GShard"
        if num_experts < 2:
            allowed, fix = "be at least 2", "pass num_experts=2"
            raise ShapeError(word("num_experts", got=num_experts, allowed=allowed, where=where, fix=fix))
        check("GShard", width, num_experts, top_k, capacity_factor)
        if top_k != 2:
            fix = f"pass top_k=2, or use TopK with top_k={top_k}"
            raise UsageError(word("top_k", got=top_k, allowed="be 2", where=where, fix=fix))
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.capacity_factor = capacity_factor
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; in training, ``generator`` decides which second experts are kept.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE, score_TE = self.scored(x_TD)
        index_TK, weight_TK = self.chosen(score_TE)
        routing = Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=score_TE, logit_TE=logit_TE
        )
        second_R = torch.arange(2, device=x_TD.device).repeat(len(x_TD))[routing.entry_R]
        if self.training:
            second_T = weight_TK[:, 1].detach()
            keep_T = 2 * second_T > draw(torch.rand, second_T, generator)
            keep_R = (second_R == 0) | keep_T[routing.token_R]
            # A second choice that chance skips was never asked for: only capacity counts as dropping.
            routing = dataclasses.replace(routing.keep(keep_R), wanted_E=None, before=None)
            second_R = second_R[keep_R]
        if self.capacity_factor is None:
            return routing
        refuse_capacity(self.capacity_factor)
        # Within each expert: first choices, then second ones, each by position.
        order_R = torch.argsort(routing.expert_R * 2 + second_R, stable=True)
        place_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(len(order_R), device=x_TD.device))
        most = capacity(len(x_TD), self.num_experts, 2, self.capacity_factor)
        return routing.keep(place_R - routing.offset_E[routing.expert_R] < most)

    def scored(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """As ``turnout.decide.token.gate.ByScore``."""
        logit_TE = linear(x_TD, self.weight)
        return logit_TE, softmax(logit_TE)

    def chosen(self, score_TE: Tensor, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """As ``turnout.decide.token.gate.ByScore``."""
        index_TK = picked(score_TE, 2, rank)
        weight_TK = score_TE.gather(1, index_TK)
        return index_TK, weight_TK / weight_TK.sum(1, keepdim=True)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, capacity_factor={self.capacity_factor}"
