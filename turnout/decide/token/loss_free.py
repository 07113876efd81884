"""Loss-free balancing: a bias on the scores, moved by the observed load, decides who is chosen but not by how much."""

from typing import Literal

import torch
from torch import Tensor, nn

from turnout.decide.token.correction import Corrected
from turnout.decide.token.gate import Priority, check, limit, linear, picked, sigmoid, softmax
from turnout.errors import UsageError, word
from turnout.types import Routing

__all__ = ["LossFree"]


class LossFree(Corrected):
    """Each token takes the k experts with the highest biased score; the weights are the scores without the bias.

    s = sigmoid(W x) or softmax(W x); chosen = the k largest of s_e + b_e; g_e = s_e for those. After every optimizer
    step b_e moves by rate * sign(mean load - load_e): up for an expert that got too few tokens, down for one with too
    many. No gradient reaches b, and b reaches no weight.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        scores: "sigmoid" or "softmax".
        renormalize: whether the K weights of a token are scaled to sum to 1.
        rate: how far the bias moves per step; 0 leaves it alone.
        capacity_factor: c > 0 limits every expert to max(1, ceil(c T K / E)) tokens; None drops nothing.
        priority: whom a full expert keeps: "weight" the highest weights, "position" the earliest tokens.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: another name for scores, a negative rate, or a capacity_factor that is not positive.

    >>> router = LossFree(4, 3, top_k=1, rate=0.1)
    >>> router.after_step(torch.tensor([6, 0, 0]))
    >>> router.bias_E
    tensor([-0.1000,  0.1000,  0.1000])

    Takes: K experts a token; 2 D E operations a token.

    Source: Wang et al., 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts". ``bias_E`` stays
    in fp32 when the module is cast down, or steps of 0.001 would vanish.
    """

    bias_E: Tensor  # pyrefly: ignore[bad-override-mutable-attribute] - it always has one

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        scores: Literal["sigmoid", "softmax"] = "sigmoid",
        renormalize: bool = False,
        rate: float = 0.001,
        capacity_factor: float | None = None,
        priority: Priority = "weight",
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("LossFree", width, num_experts, top_k, capacity_factor, priority)
        if scores not in ("sigmoid", "softmax") or not rate >= 0:
            raise UsageError(
                word(
                    "scores and rate",
                    got=f"{scores!r} and {rate}",
                    allowed="be 'sigmoid' or 'softmax', and not negative",
                    where="turnout.decide.token.LossFree",
                    fix="pass scores='sigmoid' and rate=0.001",
                )
            )
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.scores, self.renormalize, self.rate = scores, renormalize, rate
        self.capacity_factor, self.priority = capacity_factor, priority
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))
        self.register_buffer("bias_E", torch.zeros(num_experts, dtype=torch.float32))

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
        logit_TE = linear(x_TD, self.weight)
        return logit_TE, sigmoid(logit_TE) if self.scores == "sigmoid" else softmax(logit_TE)

    def chosen(self, score_TE: Tensor, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """As ``turnout.decide.token.gate.ByScore``."""
        index_TK = picked(score_TE + self.bias_E, self.top_k, rank)
        weight_TK = score_TE.gather(1, index_TK)
        if self.renormalize:
            weight_TK = weight_TK / (weight_TK.sum(1, keepdim=True) + 1e-20)
        return index_TK, weight_TK

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, scores={self.scores!r}, rate={self.rate}"
