"""The gate of FedJETs: on features of a frozen network, which expert answers, and which experts a client trains."""

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, largest, linear, softmax
from turnout.errors import ShapeError, word
from turnout.types import Routing
from turnout.types.called import Called

__all__ = ["FedJETs"]


class FedJETs(Called):
    """Each example takes the experts that fit the features best that a frozen, common network sees in it.

    g = softmax(W h + b); an example takes the k largest, weighted by g over these k. A whole client is sent the experts
    that are largest in its mean g (``assign``); its examples choose ``among`` them, and in training take all of them.

    Args:
        width: D, of the features h.
        num_experts: E.
        top_k: k, in [1, E].
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from; the bias starts at zero.
        generator: where that chance comes from; torch's default when None.

    Raises:
        ShapeError: a size is below 1, or top_k not in [1, E].

    >>> gate = FedJETs(2, 3, top_k=1)
    >>> _ = gate.weight.data.copy_(torch.tensor([[1.0, 0], [0, 1], [0, 0.5]]))
    >>> h_TD = torch.tensor([[0.0, 2.0], [0.1, 2.0]])
    >>> gate(h_TD).expert_R.tolist(), gate.assign(h_TD, 2).tolist()
    ([1, 1], [1, 2])

    Takes: K experts an example; 2 E times the features' width an example.

    Source: Dun et al., 2023, "FedJETs: Efficient Just-In-Time Personalization with Federated Mixture of Experts", from
    the text: there is no published code, and the weights over the k chosen are our reading.
    """

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 1,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("FedJETs", width, num_experts, top_k, None)
        self.width, self.num_experts, self.top_k = width, num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(
        self,
        x_TD: Tensor,
        *,
        among: Tensor | None = None,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The routing of these examples; ``token_id_T`` and ``generator`` are not used.

        Args:
            x_TD: (T, D), their features.
            among: (K,) int64, the experts that a client has. Each example takes all of them in training, and the
                ``top_k`` of them else. None is all experts, of which it takes ``top_k``.

        Raises:
            ShapeError: x_TD is not (T, width), or among names an expert that there is not.
        """
        logit_TE = linear(x_TD, self.weight)
        logit_TE = logit_TE + self.bias.to(logit_TE.dtype)
        if among is None:
            index_TK = largest(logit_TE, self.top_k)
        else:
            if among.ndim != 1 or not among.numel() or not bool(((among >= 0) & (among < self.num_experts)).all()):
                got, allowed = among.tolist(), f"be experts from 0 to {self.num_experts - 1}"
                where, fix = "turnout.decide.token.FedJETs", "pass what assign gives"
                raise ShapeError(word("among", got=got, allowed=allowed, where=where, fix=fix))
            index_TK = among.expand(len(x_TD), -1)
            if not self.training and len(among) > self.top_k:
                index_TK = among[largest(logit_TE[:, among], self.top_k)]
        weight_TK = softmax(logit_TE.gather(1, index_TK))
        return Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=softmax(logit_TE), logit_TE=logit_TE
        )

    @torch.no_grad()
    def assign(self, x_TD: Tensor, keep: int) -> Tensor:
        """(keep,) int64, the experts with the largest mean g over a client's examples, in their own order.

        Raises:
            ShapeError: keep is not between 1 and the number of experts.
        """
        check("FedJETs.assign", self.width, self.num_experts, keep, None)
        score_TE = self(x_TD).score_TE
        assert score_TE is not None, "forward gives scores"
        return largest(score_TE.mean(0).unsqueeze(0), keep)[0].sort()[0]

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}"
