"""FedIns: an instance takes the members of a pool whose keys are nearest to what a frozen network sees in it."""

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, check_tokens, largest, linear
from turnout.errors import ShapeError, word
from turnout.types import Given, Routing
from turnout.types.called import Called

__all__ = ["FedIns"]

_WHERE = "turnout.decide.token.FedIns"


class FedIns(Called):
    """Each sequence, or instance, takes the k members of a pool with the most similar keys, with equal weights.

    s_e = cos(q, key_e); the k largest get 1 / k each. The weights have no gradient, the keys learn by ``match``. It is
    a router of sequences: whoever runs it averages the members' parameters.

    Args:
        width: D, of the tokens.
        num_experts: E, the size of the pool.
        top_k: k, in [1, E].
        query_width: Q, to read ``query_BQ`` (B, Q) of ``turnout.layers.given`` as q; None takes the mean of the
            sequence's tokens, padding left out.
        std: standard deviation of the normal distribution that the keys, ``weight`` (E, Q), start from.
        generator: where the starting keys' chance comes from; torch's default when None.

    Raises:
        ShapeError: a size is below 1, or top_k not in [1, E].

    >>> router = FedIns(2, 3, top_k=1)
    >>> _ = router.weight.data.copy_(torch.tensor([[1.0, 0], [0, 1], [-1, 0]]))
    >>> router(torch.tensor([[0.1, 9.0], [-2.0, 0.0]]), given=Given.of(2, 2)).dense().argmax(1).tolist()
    [1, 2]

    Takes: K adapters a sequence, averaged; 2 E times the keys' width a sequence.

    Source: Feng et al., 2023, "Towards Instance-adaptive Inference for Federated Learning". Keys start from a
    normal distribution, in the published code from a truncated one. That code takes one instance at a time; a batch
    would share one choice.
    """

    parts = 1  # a router of sequences: one row of the routing each

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 3,
        query_width: int | None = None,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        reads = width if query_width is None else query_width
        check("FedIns", min(width, reads), num_experts, top_k, None)
        self.width, self.num_experts, self.top_k, self.query_width = width, num_experts, top_k, query_width
        self.weight = nn.Parameter(torch.empty(num_experts, reads).normal_(0, std, generator=generator))

    def forward(
        self,
        x_TD: Tensor,
        *,
        given: Given,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The routing of ``given.num_sequences`` rows; its logits are the similarities. The generator is not used.

        Raises:
            ShapeError: x_TD is not (T, width), or the query not (B, query_width).
            UsageError: the router reads a query, and none was given.
        """
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        if self.query_width is None:
            check_tokens(x_TD, self.width)
            query_BQ = given.mean(x_TD.to(dtype))
        else:
            query_BQ = given.need("query_BQ", _WHERE).to(dtype)
            if query_BQ.ndim != 2 or query_BQ.shape[1] != self.query_width:
                allowed, fix = f"have the shape (B, {self.query_width})", "pass features of query_width"
                raise ShapeError(word("query_BQ", got=tuple(query_BQ.shape), allowed=allowed, where=_WHERE, fix=fix))
        near_BE = linear(_unit(query_BQ), _unit(self.weight.to(dtype)))
        index_BK = largest(near_BE, self.top_k)
        weight_BK = torch.full_like(near_BE[:, : self.top_k], 1 / self.top_k).detach()
        return Routing.from_topk(index_BK, weight_BK, num_experts=self.num_experts, logit_TE=near_BE)

    def match(self, query_BQ: Tensor) -> Tensor:
        """The sum of a query's k similarities to the keys it chooses, the mean over queries; 1 - match is the loss."""
        near_BE = linear(_unit(query_BQ), _unit(self.weight))
        return near_BE.gather(1, largest(near_BE, self.top_k)).sum(1).mean()

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        reads = "" if self.query_width is None else f", query_width={self.query_width}"
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}{reads}"


def _unit(x_ND: Tensor) -> Tensor:
    return nn.functional.normalize(x_ND, dim=1)
