"""PHATGOOSE: a token takes the adapters whose gate, trained for each adapter on its own, points the way it does."""

import math

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, check_tokens, largest, linear, softmax, standard
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["PHATGOOSE"]


class PHATGOOSE(Called):
    """Each token takes the k adapters whose normalised gate is most like it, at every linear map anew.

    a_e = <LN(v_e), LN(u)> / sqrt(D), LN without gain and shift; p = softmax(a) over all adapters; g_e = p_e for the k
    largest, over their sum. The gate v_e was trained while all else stood still, by B A u * sigmoid(<v_e, u>) in the
    place of B A u: see ``turnout.reshape.train_gates``. The scale of neither v_e nor u matters here.

    Args:
        width: D, of the tokens.
        num_experts: E, the adapters.
        top_k: K, adapters per token, 1 to E.
        std: standard deviation of what stands in ``weight`` (E, D) until the gates are set.
        generator: where that chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.

    >>> router = PHATGOOSE(2, 2, top_k=1)
    >>> _ = router.weight.data.copy_(torch.eye(2))
    >>> router(torch.tensor([[3.0, 1.0], [0.0, 20.0]])).expert_R.tolist()
    [0, 1]

    Takes: K adapters a token; 2 D E operations a token.

    Source: Muqeeth et al., 2024, "Learning to Route Among Specialized Experts for Zero-Shot Generalization". The
    published code divides by the sum of the k plus 1e-6; here by the sum.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("PHATGOOSE", width, num_experts, top_k, None)
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = likeness(x_TD, self.weight)
        score_TE = softmax(logit_TE)
        index_TK = largest(score_TE, self.top_k)
        weight_TK = score_TE.gather(1, index_TK)
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        return Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=score_TE, logit_TE=logit_TE
        )

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}"


def likeness(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """(T, E) fp32, <LN(v), LN(u)> / sqrt(D) of every token and gate."""
    check_tokens(x_TD, weight_ED.shape[1])
    dtype = torch.promote_types(weight_ED.dtype, torch.float32)
    return linear(standard(x_TD.to(dtype)), standard(weight_ED.to(dtype))) / math.sqrt(weight_ED.shape[1])
