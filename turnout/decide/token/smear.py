"""SMEAR: no choice at all. Experts are averaged with the router's probabilities, and one merged expert runs."""

import dataclasses

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, check_tokens, draw, linear, softmax, standard
from turnout.errors import ShapeError, UsageError, word
from turnout.types import Given, Routing
from turnout.types.called import Called

__all__ = ["SMEAR"]

_WHERE = "turnout.decide.token.SMEAR"


class SMEAR(Called):
    """Each sequence takes all experts, with weights that whoever runs it averages their *parameters* with.

    h = the mean of the sequence's tokens, padding left out; p = softmax((LN(h) * g) . LN(w_e) + b_e). In training each
    p_e is dropped with some chance, and the rest scaled to sum to 1. It is a router of sequences: layers merge the
    experts, theta = sum_e p_e theta_e, and run that one.

    The mean is of the tokens of the very call. In training a causal model on whole texts it therefore tells early
    tokens of later ones, and with a KV cache the first call routes by the prompt, each later one by its new token
    alone. With ``query_width`` the router reads instead what the caller says by ``turnout.layers.given(query_BQ=...)``,
    say the mean of the prompt's embeddings: nothing leaks, and all calls of a generation take the same weights.

    Args:
        width: D, of the tokens.
        num_experts: E.
        query_width: Q, to read ``query_BQ`` (B, Q) in place of h; None reads the tokens.
        dropout: the chance of dropping an expert for a sequence in training, in [0, 1).
        gain: what g (D,) starts from, above 0; small, so that all experts begin with nearly the same weight.
        std: standard deviation of the normal distribution that ``weight`` (E, D) starts from.
        generator: where the starting weights' chance comes from; torch's default when None.

    Raises:
        ShapeError: a size is below 1.
        UsageError: dropout or gain out of range.

    >>> router = SMEAR(4, 2).eval()
    >>> x_TD = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]])
    >>> routing = router(x_TD, given=Given.of(1, 2))
    >>> routing.num_tokens, round(routing.dense().sum().item(), 4)
    (1, 1.0)

    Takes: all experts a sequence, averaged; 2 D E operations a sequence.

    Source: Muqeeth et al., 2023, "Soft Merging of Experts with Adaptive Routing". There the mean counts padding. Both
    norms have a gain and a shift there; one gain and the bias express the same functions. Where all experts of a
    sequence are dropped, none is.
    """

    parts = 1  # a router of sequences: one row of the routing each

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        query_width: int | None = None,
        dropout: float = 0.1,
        gain: float = 1e-2,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        reads = width if query_width is None else query_width
        check("SMEAR", min(width, reads), num_experts, 1, None)
        for name, value, allowed, right in (
            ("dropout", dropout, 0 <= dropout < 1, "be in [0, 1)"),
            ("gain", gain, gain > 0, "be above 0"),
        ):
            if not allowed:
                raise UsageError(word(name, got=value, allowed=right, where=_WHERE, fix="leave it at the default"))
        self.width, self.num_experts, self.query_width, self.dropout = width, num_experts, query_width, dropout
        self.weight = nn.Parameter(torch.empty(num_experts, reads).normal_(0, std, generator=generator))
        self.gain = nn.Parameter(torch.full((reads,), gain))
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(
        self,
        x_TD: Tensor,
        *,
        given: Given,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The routing of ``given.num_sequences`` rows over the experts; ``generator`` draws what is dropped.

        Raises:
            ShapeError: x_TD is not (T, width), or the query not (B, query_width).
            UsageError: the router reads a query, and none was given.
        """
        check_tokens(x_TD, self.width)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        h_BD = given.mean(x_TD.to(dtype)) if self.query_width is None else self._query(given).to(dtype)
        h_BD = standard(h_BD) * self.gain.to(dtype)
        logit_BE = linear(h_BD, standard(self.weight.to(dtype))) + self.bias.to(dtype)
        score_BE = weight_BE = softmax(logit_BE)
        if self.training and self.dropout:
            kept_BE = draw(torch.rand, score_BE.detach(), generator) >= self.dropout
            kept_BE |= ~kept_BE.any(1, keepdim=True)
            weight_BE = score_BE * kept_BE
            weight_BE = weight_BE / weight_BE.sum(1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
        return dataclasses.replace(Routing.from_dense(weight_BE), score_TE=score_BE, logit_TE=logit_BE)

    def _query(self, given: Given) -> Tensor:
        query_BQ = given.need("query_BQ", _WHERE)
        if query_BQ.ndim != 2 or query_BQ.shape[1] != self.query_width:
            allowed, fix = f"have the shape (B, {self.query_width})", "pass embeddings of query_width"
            raise ShapeError(word("query_BQ", got=tuple(query_BQ.shape), allowed=allowed, where=_WHERE, fix=fix))
        return query_BQ

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        reads = "" if self.query_width is None else f", query_width={self.query_width}"
        return f"{self.width}, {self.num_experts}, dropout={self.dropout}{reads}"
