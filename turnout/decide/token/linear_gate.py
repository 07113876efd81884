"""What routers with one matrix of logits have in common."""

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, linear
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["LinearGate"]


class LinearGate(Called):
    """A router whose logits are W x; W (E, D) starts normal.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, 1 to E.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.

    Source: Shazeer et al., 2017, "Outrageously Large Neural Networks".
    """

    def __init__(
        self, width: int, num_experts: int, top_k: int, *, std: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        check(type(self).__name__, width, num_experts, top_k, None)
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))

    def logits(self, x_TD: Tensor) -> Tensor:
        """(T, E) W x, in fp32 at least."""
        return linear(x_TD, self.weight)

    def taken(self, index_TK: Tensor, weight_TK: Tensor, score_TE: Tensor, logit_TE: Tensor) -> Routing:
        """The routing in which token t goes to these experts."""
        return Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=score_TE, logit_TE=logit_TE
        )

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}"
