"""Noisy top-k: learned, input-dependent noise on the logits while training."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.decide.token.gate import Priority, check, draw, largest, limit, linear, softmax
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["NoisyTopK"]


class NoisyTopK(Called):
    """Each token takes the k experts with the highest noisy logit, weighted by a softmax over just those.

    H = W x + n * softplus(W_noise x), n ~ N(0, 1) elementwise in training and 0 otherwise; g = softmax of the k
    largest H.

    Args:
        width: D, of the tokens.
        num_experts: E.
        top_k: K, experts per token, 2 to E; with one expert the softmax is always 1 and nothing is learned from it.
        capacity_factor: c > 0 limits every expert to max(1, ceil(c T K / E)) tokens; None drops nothing.
        priority: whom a full expert keeps: "weight" the highest weights, "position" the earliest tokens.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from; ``noise_weight`` starts
            at zero, which makes the noise's own standard deviation ln 2.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: capacity_factor is not positive.

    >>> router = NoisyTopK(4, 8, top_k=2)
    >>> one, two = (router(torch.ones(3, 4), generator=torch.Generator().manual_seed(seed)).dense() for seed in (0, 1))
    >>> bool((one == two).all())
    False

    Takes: K experts a token; 4 D E operations a token.

    Source: Shazeer et al., 2017, "Outrageously Large Neural Networks", equations 3 to 5. There both gates start at
    zero; here the first starts at random, so that an untrained router does not send all tokens to the same experts
    when the noise is off. Its importance and load losses are replaced by ``turnout.train.balance``.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        capacity_factor: float | None = None,
        priority: Priority = "weight",
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("NoisyTopK", width, num_experts, top_k, capacity_factor, priority)
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.capacity_factor, self.priority = capacity_factor, priority
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, width))

    def forward(
        self, x_TD: Tensor, *, token_id_T: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Routing:
        """The routing of these tokens; in training, ``generator`` draws the noise. ``token_id_T`` is not used.

        ``logit_TE`` of the result is W x without the noise; ``score_TE`` is the softmax of H over all experts.

        Raises:
            ShapeError: x_TD is not (T, width).
        """
        logit_TE = noisy_TE = linear(x_TD, self.weight)
        if self.training:
            spread_TE = F.softplus(linear(x_TD, self.noise_weight))
            noisy_TE = logit_TE + draw(torch.randn, logit_TE, generator) * spread_TE
        index_TK = largest(noisy_TE, self.top_k)
        routing = Routing.from_topk(
            index_TK,
            noisy_TE.gather(1, index_TK).softmax(1),
            num_experts=self.num_experts,
            score_TE=softmax(noisy_TE),
            logit_TE=logit_TE,
        )
        return limit(routing, self.top_k, self.capacity_factor, self.priority)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}"
