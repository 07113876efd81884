"""VQ: the nearest code of a codebook says the expert, and there is no gate to learn."""

import dataclasses

import torch
from torch import Tensor, nn

from turnout.decide.token.balanced import one_choice
from turnout.decide.token.gate import check, check_tokens, largest
from turnout.errors import UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["VQ"]


class VQ(Called):
    """Each token goes to the expert of the nearest of E codes, with weight 1.

    i = argmin_m |x - c_m|^2. Beside the loss it asks for strength * (mean (c_i - sg x)^2 + commitment mean (sg c_i -
    x)^2), means over tokens and width, sg stopping the gradient: codes move to their tokens, and tokens to their codes.
    Nothing else trains the codes.

    Args:
        width: D, of the tokens.
        num_experts: E, of which each has one code.
        top_k: 1.
        strength: weight of both terms, 0 or more.
        commitment: weight of the second beside the first, 0 or more.
        std: standard deviation of the normal distribution that ``weight`` (E, D), the codes, starts from.
        generator: where the starting codes' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not 1, or a size is below 1.
        UsageError: a negative weight.

    >>> router = VQ(1, 2)
    >>> _ = router.weight.data.copy_(torch.tensor([[-1.0], [1.0]]))
    >>> router(torch.tensor([[0.9], [-5.0]])).dense().tolist()
    [[0.0, 1.0], [1.0, 0.0]]

    Takes: 1 expert a token; 2 D E operations a token.

    Source: Do et al., 2024, "On the Role of Discrete Representation in Sparse Mixture of Experts" (VQMoE), its discrete
    branch. Their codes start uniform within 1 / E of 0.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        strength: float = 0.08,
        commitment: float = 0.25,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("VQ", width, num_experts, top_k, None)
        one_choice("VQ", top_k)
        if not (strength >= 0 and commitment >= 0):
            got, fix = f"{strength} and {commitment}", "pass strength=0.08 and commitment=0.25"
            where, allowed = "turnout.decide.token.VQ", "not be negative"
            raise UsageError(word("strength and commitment", got=got, allowed=allowed, where=where, fix=fix))
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.strength, self.commitment = strength, commitment
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        ``logit_TE`` of the result is -|x - c|^2, and ``score_TE`` its softmax, for reports.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        check_tokens(x_TD, self.width)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            x_TD, code_ED = x_TD.to(dtype), self.weight.to(dtype)
            apart_TED = x_TD[:, None] - code_ED
            logit_TE = -apart_TED.square().sum(2)
            index_T1 = largest(logit_TE, 1)
            routing = Routing.from_topk(
                index_T1,
                logit_TE.new_ones(len(x_TD), 1),
                num_experts=self.num_experts,
                score_TE=logit_TE.softmax(1),
                logit_TE=logit_TE,
            )
            if not len(x_TD):
                return routing
            nearest_TD = code_ED[index_T1[:, 0]]
            moved = (nearest_TD - x_TD.detach()).square().mean()
            kept = (nearest_TD.detach() - x_TD).square().mean()
        return dataclasses.replace(routing, penalty=self.strength * (moved + self.commitment * kept))

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}"
