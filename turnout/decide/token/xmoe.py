"""X-MoE: routing by the angle between a token and an expert, in few dimensions."""

import math

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, largest, linear, softmax
from turnout.errors import UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["XMoE"]

_MOST = math.log(100.0)  # of the logarithm of the scale


class XMoE(Called):
    """Top-k by the cosine of a projected token and an expert's vector, times a learned scale.

    z = P x + b; l_e = exp(min(tau, ln 100)) cos(z, m_e); p = softmax(l); g_e = p_e for the k largest. Lengths do not
    count, so no expert is chosen more because its vector is long, and tokens are not drawn towards the vectors.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 1 to E.
        rank: of the projection; None for half of the experts, 2 at least.
        temperature: exp(-tau) at the start, above 0; above 0.01, where tau would have no gradient.
        std: standard deviation of the normal distribution that the projection and the experts' vectors start from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: rank or temperature out of range.

    >>> router, x_TD = XMoE(4, 8), torch.randn(3, 4)
    >>> torch.equal(router(x_TD).token_R, router(4 * x_TD).token_R)
    True

    Takes: K experts a token; 2 P (D + E) operations a token.

    Source: Chi et al., 2022, "On the Representation Collapse of Sparse Mixture of Experts"; the scale's limit as in
    Tutel. The start is their temperature 0.3 (Tutel's is 0.5), and the bias of the projection starts at 0.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        rank: int | None = None,
        temperature: float = 0.3,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("XMoE", width, num_experts, top_k, None)
        rank = max(2, num_experts // 2) if rank is None else rank
        if rank < 1 or not 0.01 < temperature < float("inf"):
            got, fix = f"{rank} and {temperature}", "pass rank=None and temperature=0.3"
            where, allowed = "turnout.decide.token.XMoE", "be at least 1, and above 0.01"
            raise UsageError(word("rank and temperature", got=got, allowed=allowed, where=where, fix=fix))
        self.width, self.num_experts, self.top_k, self.rank = width, num_experts, top_k, rank
        self.projection = nn.Parameter(torch.empty(rank, width).normal_(0, std, generator=generator))
        self.projection_bias = nn.Parameter(torch.zeros(rank))
        self.expert = nn.Parameter(torch.empty(num_experts, rank).normal_(0, std, generator=generator))
        self.log_scale = nn.Parameter(torch.tensor(-math.log(temperature)))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        z_TP = linear(x_TD, self.projection, self.projection_bias)
        unit_TP = nn.functional.normalize(z_TP, dim=1)
        unit_EP = nn.functional.normalize(self.expert.to(z_TP.dtype), dim=1)
        logit_TE = self.log_scale.to(z_TP.dtype).clamp_max(_MOST).exp() * linear(unit_TP, unit_EP)
        score_TE = softmax(logit_TE)
        index_TK = largest(score_TE, self.top_k)
        tables = {"score_TE": score_TE, "logit_TE": logit_TE}
        return Routing.from_topk(index_TK, score_TE.gather(1, index_TK), num_experts=self.num_experts, **tables)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, rank={self.rank}"
