"""Switch: one expert a token, jitter on the input, the earliest tokens first."""

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, draw, limit, linear, picked, softmax
from turnout.errors import UsageError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["Switch"]


class Switch(Called):
    """Each token takes the one expert with the highest softmax probability, with that probability as its weight.

    p = softmax(W (x * u)), u ~ U(1 - jitter, 1 + jitter) elementwise in training and 1 otherwise; e = argmax p;
    g = p_e.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: 1; taken so that all routers are built alike.
        jitter: how far the noise on the gate's input goes, in [0, 1). It multiplies; it never reaches the experts.
        capacity_factor: c > 0 limits every expert to max(1, ceil(c T / E)) tokens, the earliest first, as the paper
            (1.0 to 2.0 there); None drops nothing.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: a size is below 1.
        UsageError: top_k is not 1, or jitter or capacity_factor is out of range.

    >>> router = Switch(2, 2, capacity_factor=1.0).eval()
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> print(router(torch.tensor([[1.0, 0.0], [2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])))
    Routing(4 tokens -> 2 experts, 3 entries, 0.75 per token, load 1..2, 1 dropped)

    Takes: 1 expert a token; 2 D E operations a token.

    Source: Fedus et al., 2021, "Switch Transformers". Dropless by default, where the paper drops.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        jitter: float = 0.01,
        capacity_factor: float | None = None,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("Switch", width, num_experts, top_k, capacity_factor)
        where = "turnout.decide.token.Switch"
        if top_k != 1:
            fix = f"pass top_k=1, or use TopK with top_k={top_k}"
            raise UsageError(word("top_k", got=top_k, allowed="be 1", where=where, fix=fix))
        if not 0 <= jitter < 1:
            raise UsageError(word("jitter", got=jitter, allowed="be in [0, 1)", where=where, fix="pass jitter=0.01"))
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.jitter, self.capacity_factor = jitter, capacity_factor
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; in training, ``generator`` draws the jitter. ``token_id_T`` is not used.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        if self.training and self.jitter > 0:
            x_TD = x_TD.to(torch.promote_types(self.weight.dtype, torch.float32))
            x_TD = x_TD * (1 + self.jitter * (2 * draw(torch.rand, x_TD, generator) - 1))
        logit_TE, score_TE = self.scored(x_TD)
        chosen, more = self.chosen(score_TE), {"score_TE": score_TE, "logit_TE": logit_TE}
        routing = Routing.from_topk(*chosen, num_experts=self.num_experts, **more)
        return limit(routing, 1, self.capacity_factor, "position")

    def scored(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """As ``turnout.decide.token.gate.ByScore``; without jitter."""
        logit_TE = linear(x_TD, self.weight)
        return logit_TE, softmax(logit_TE)

    def chosen(self, score_TE: Tensor, *, rank: int | None = None) -> tuple[Tensor, Tensor]:
        """As ``turnout.decide.token.gate.ByScore``."""
        index_TK = picked(score_TE, 1, rank)
        return index_TK, score_TE.gather(1, index_TK)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, jitter={self.jitter}"
