"""Experts that compute next to nothing: one gives zero, one its input, and some a learned vector mixed into it."""

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.types import Cost, Routing
from turnout.types.called import Called

__all__ = ["ZeroComputation"]


class ZeroComputation(Called):
    """Zero-computation experts, in this order: constant(x) = a1 x + a2 v, copy(x) = x, zero(x) = 0.

    [a1, a2] = softmax(W x), W (2, D) and v (D,) of each constant expert. A zero expert takes no work and, chosen beside
    another, takes weight from it.

    Args:
        width: D, of the tokens.
        constant: how many of the first kind.
        copy: of the second.
        zero: of the third.
        std: standard deviation of the normal distribution that W starts from; that of v is 1.
        generator: where the chance comes from; torch's default when None.

    Raises:
        UsageError: a number below 0, or no expert at all.

    >>> bank = ZeroComputation(2, constant=0, copy=1, zero=1)
    >>> routing = Routing.from_topk(torch.tensor([[0], [1]]), torch.full((2, 1), 0.5), num_experts=2)
    >>> bank(torch.ones(2, 2), routing).tolist()
    [[0.5, 0.5], [0.0, 0.0]]

    Source: Jin et al., 2024, "MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts", equations
    4 to 6.
    """

    def __init__(
        self,
        width: int,
        *,
        constant: int = 2,
        copy: int = 1,
        zero: int = 1,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if min(constant, copy, zero) < 0 or constant + copy + zero < 1:
            got, fix = f"{constant}, {copy} and {zero}", "pass constant=2, copy=1 and zero=1"
            where, allowed = "turnout.paths.ZeroComputation", "be at least 0, and 1 together"
            raise UsageError(word("constant, copy and zero", got=got, allowed=allowed, where=where, fix=fix))
        self.width, self.constant, self.copy, self.zero = width, constant, copy, zero
        self.value_ND = nn.Parameter(torch.empty(constant, width).normal_(0, 1, generator=generator))
        self.mix_N2D = nn.Parameter(torch.empty(constant, 2, width).normal_(0, std, generator=generator))

    @property
    def num_experts(self) -> int:
        """How many in all."""
        return self.constant + self.copy + self.zero

    def forward(self, x_TD: Tensor, routing: Routing, *, backend: str = "auto") -> Tensor:
        """(T, D), each token's weighted sum of these experts' outputs; ``backend`` is not used."""
        end = int(routing.offset_E[self.constant + self.copy])  # what goes to zero adds nothing
        token_R, expert_R = routing.token_R[:end], routing.expert_R[:end]
        x_RD, weight_R1 = x_TD[token_R], routing.weight_R[:end, None]
        made_RD = x_RD
        if self.constant and end:
            last = int(routing.offset_E[self.constant])
            mix_R2 = torch.einsum("rd,rjd->rj", x_RD[:last], self.mix_N2D[expert_R[:last]].to(x_RD.dtype)).softmax(1)
            mixed_RD = mix_R2[:, :1] * x_RD[:last] + mix_R2[:, 1:] * self.value_ND[expert_R[:last]].to(x_RD.dtype)
            made_RD = torch.cat([mixed_RD, x_RD[last:]])
        made_RD = (made_RD * weight_R1).to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, token_R, made_RD)

    def cost(self, tokens: int, entries: float) -> Cost:
        """What a forward pass takes: products with the vectors that mix, and nothing for the others."""
        share = self.constant / self.num_experts
        each = 3 * self.width
        return Cost(
            params=each * self.constant,
            params_active=round(each * entries * share / max(tokens, 1)),
            flops=2.0 * entries * share * 2 * self.width,
        )

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"width={self.width}, constant={self.constant}, copy={self.copy}, zero={self.zero}"
