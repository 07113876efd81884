"""Arrow: a token takes the adapters that its activation points along. Nothing is trained."""

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, largest, linear, softmax
from turnout.errors import UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["Arrow"]


class Arrow(Called):
    """Each token takes the k adapters whose direction has the largest product with it, whatever the sign.

    v_e = the first right singular vector of B_e A_e; s_e = |v_e . x| / temperature; g = softmax of the k largest s.
    The directions come from ``turnout.paths.LoRA.directions``, exactly; nothing is trained after that.

    Args:
        width: D, of the tokens.
        num_experts: E, the adapters.
        top_k: K, adapters per token, 1 to E.
        temperature: above 0; a smaller one is sharper.
        std: standard deviation of what stands in ``weight`` (E, D) until the directions are set.
        generator: where that chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: temperature is not positive.

    >>> router = Arrow(2, 2, top_k=1)
    >>> _ = router.weight.data.copy_(torch.eye(2))
    >>> router(torch.tensor([[-3.0, 1.0], [0.0, 2.0]])).expert_R.tolist()
    [0, 1]

    Takes: K adapters a token; 2 D E operations a token.

    Source: Ostapenko et al., 2024, "Towards Modular LLMs by Building and Reusing a Library of LoRAs". The softmax runs
    over the chosen k, as there; PEFT's version finds v_e by 15 steps of power iteration from a random start.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        temperature: float = 1.0,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("Arrow", width, num_experts, top_k, None)
        if not temperature > 0:
            fix = "pass temperature=1.0"
            where = "turnout.decide.token.Arrow"
            raise UsageError(word("temperature", got=temperature, allowed="be above 0", where=where, fix=fix))
        self.width, self.num_experts, self.top_k, self.temperature = width, num_experts, top_k, temperature
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = linear(x_TD, self.weight).abs() / self.temperature
        index_TK = largest(logit_TE, self.top_k)
        weight_TK = softmax(logit_TE.gather(1, index_TK))
        return Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=softmax(logit_TE), logit_TE=logit_TE
        )

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, temperature={self.temperature}"
