"""Expert choice: every expert picks its tokens, so that the load is even by construction."""

import math

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, largest, linear, softmax
from turnout.types import Routing
from turnout.types.called import Called
from turnout.types.invariant import refuse_invariant

__all__ = ["ExpertChoice"]


class ExpertChoice(Called):
    """Each expert takes the C tokens that score it highest; a token may get many experts, or none.

    S = softmax(W x) over the experts; expert e takes the C largest of column e, each with weight S[t, e];
    C = ceil(c T / E), at least 1 and at most T.

    **It leaks the future**: whether a token is among an expert's C depends on all other tokens of the call, later ones
    included. Use it where the whole input is known (encoders, vision, diffusion), not for causal generation.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: how many experts a token gets on average: c, when ``capacity_factor`` is None.
        capacity_factor: c > 0, the same as any number; it wins over ``top_k``.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: capacity_factor is not positive.

    >>> router = ExpertChoice(8, 4, capacity_factor=1.0)
    >>> router(torch.randn(12, 8, generator=torch.Generator().manual_seed(0))).load_E.tolist()
    [3, 3, 3, 3]

    Takes: C tokens an expert; 2 D E operations a token.

    Source: Zhou et al., 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2, without the limit on
    experts per token of section 3.3.
    """

    sees_later_tokens = True

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
        check("ExpertChoice", width, num_experts, top_k, capacity_factor)
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.capacity_factor = float(top_k) if capacity_factor is None else capacity_factor
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        refuse_invariant(
            "experts that choose among all tokens", "ExpertChoice", "take a router whose tokens choose: TopK"
        )
        logit_TE = linear(x_TD, self.weight)
        score_TE = softmax(logit_TE)
        num_tokens, num_experts = score_TE.shape
        taken = min(num_tokens, max(1, math.ceil(self.capacity_factor * num_tokens / num_experts)))
        score_ET = score_TE.t()
        token_EC = largest(score_ET, taken).sort(1)[0]
        return Routing(
            token_R=token_EC.reshape(-1),
            weight_R=score_ET.gather(1, token_EC).reshape(-1),
            offset_E=torch.arange(num_experts + 1, device=x_TD.device) * taken,
            num_tokens=num_tokens,
            score_TE=score_TE,
            logit_TE=logit_TE,
        )

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, capacity_factor={self.capacity_factor}"
