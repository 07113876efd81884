"""Glider: PHATGOOSE's choice for each token, guided by what the whole sequence asks for."""

import math

import torch
from torch import Tensor, nn

from turnout.decide.token.gate import check, largest, linear, softmax
from turnout.decide.token.phatgoose import likeness
from turnout.errors import ShapeError, UsageError, word
from turnout.types import Given, Routing
from turnout.types.called import Called

__all__ = ["Glider"]

_WHERE = "turnout.decide.token.Glider"


class Glider(Called):
    """Each token takes the k adapters that its own direction and the sequence's request point to.

    l_e = <LN(v_e), LN(u)> / sqrt(D), as PHATGOOSE; c_e = cos(d_e, q), with d_e an embedding of what adapter e was made
    for and q one of what the sequence asks for, ``query_BQ`` of ``turnout.layers.given``; a_e = l_e + s * c_e with
    s = gamma * [max_e c_e > threshold] + beta; p = softmax(a) over all adapters; g_e = p_e for the k largest, over
    their sum. A request that is clearly one adapter's overrules the tokens; another one only leans on them.

    Any encoder may make the embeddings, the same for d and q, for instance ``turnout.models.SentenceEncoder``. The
    threshold goes with how alike it finds texts: 0.8 is for a q that is an instruction like the adapters' own ("The
    task is to ..."), as the paper has a language model write it; all-MiniLM-L6-v2 has bare requests at 0.1 to 0.6.

    Args:
        width: D, of the tokens.
        num_experts: E, the adapters.
        top_k: K, adapters per token, 1 to E.
        query_width: Q, of the embeddings.
        gamma: what a request above the threshold adds to s, at least 0.
        beta: s of any request, at least 0.
        threshold: in [-1, 1]; at 1 no request is above it.
        std: standard deviation of what stands in ``weight`` (E, D) and ``embedding`` (E, Q) until they are set.
        generator: where that chance comes from; torch's default when None.

    Raises:
        ShapeError: top_k is not between 1 and E, or a size is below 1.
        UsageError: gamma, beta or threshold out of range.

    >>> router = Glider(2, 2, top_k=1, query_width=2)
    >>> _ = router.weight.data.copy_(torch.eye(2)), router.embedding.data.copy_(torch.eye(2))
    >>> x_TD, query_BQ = torch.tensor([[3.0, 1.0], [3.0, 1.0]]), torch.tensor([[0.7, 0.7], [0.1, 9.0]])
    >>> router(x_TD, given=Given.of(2, 2, query_BQ=query_BQ)).dense().argmax(1).tolist()
    [0, 1]

    Takes: K adapters a token; 2 D E operations a token, and 2 E times the embedding's width a sequence.

    Source: Li et al., 2025, "Glider: Global and Local Instruction-Driven Expert Router". The published code has no
    threshold: there s is set by hand for each benchmark (100, 3 or 1000), and q is looked up by the name of the task.
    It divides by the sum of the k plus 1e-6; here by the sum.
    """

    needs_given = True  # a router of tokens that reads what is known of their sequence

    def __init__(
        self,
        width: int,
        num_experts: int,
        *,
        top_k: int = 2,
        query_width: int = 384,
        gamma: float = 100.0,
        beta: float = 3.0,
        threshold: float = 0.8,
        std: float = 0.02,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        check("Glider", min(width, query_width), num_experts, top_k, None)
        for name, value, allowed, right in (
            ("gamma", gamma, 0 <= gamma < math.inf, "be 0 or more"),
            ("beta", beta, 0 <= beta < math.inf, "be 0 or more"),
            ("threshold", threshold, -1 <= threshold <= 1, "be in [-1, 1], a cosine"),
        ):
            if not allowed:
                raise UsageError(word(name, got=value, allowed=right, where=_WHERE, fix="leave it at the default"))
        self.width, self.num_experts, self.top_k, self.query_width = width, num_experts, top_k, query_width
        self.gamma, self.beta, self.threshold = gamma, beta, threshold
        self.weight = nn.Parameter(torch.empty(num_experts, width).normal_(0, std, generator=generator))
        self.embedding = nn.Parameter(torch.empty(num_experts, query_width).normal_(0, std, generator=generator))

    def forward(
        self,
        x_TD: Tensor,
        *,
        given: Given,
        token_id_T: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Routing:
        """The routing of these tokens; ``token_id_T`` and ``generator`` are not used.

        Raises:
            ShapeError: x_TD is not (T, width), or the query not (B, query_width).
            UsageError: no query was given.
        """
        logit_TE = likeness(x_TD, self.weight)
        logit_TE = logit_TE + self.guidance(given).index_select(0, given.sequence_T)
        score_TE = softmax(logit_TE)
        index_TK = largest(score_TE, self.top_k)
        weight_TK = score_TE.gather(1, index_TK)
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        return Routing.from_topk(
            index_TK, weight_TK, num_experts=self.num_experts, score_TE=score_TE, logit_TE=logit_TE
        )

    def guidance(self, given: Given) -> Tensor:
        """(B, E) fp32, s * c_e: what each sequence's request adds to the logits of its tokens.

        Raises:
            ShapeError: the query is not (B, query_width).
            UsageError: no query was given.
        """
        query_BQ = given.need("query_BQ", _WHERE)
        if query_BQ.ndim != 2 or query_BQ.shape[1] != self.query_width:
            got, allowed = tuple(query_BQ.shape), f"have the shape (B, {self.query_width})"
            fix = "embed the requests with the encoder that embedded what the adapters are for"
            raise ShapeError(word("query_BQ", got=got, allowed=allowed, where=_WHERE, fix=fix))
        dtype = torch.promote_types(self.embedding.dtype, torch.float32)
        unit_EQ = nn.functional.normalize(self.embedding.to(dtype), dim=1)
        cosine_BE = linear(nn.functional.normalize(query_BQ.to(dtype), dim=1), unit_EQ)
        sure_B1 = cosine_BE.amax(1, keepdim=True) > self.threshold
        return cosine_BE * (self.gamma * sure_B1 + self.beta)

    def extra_repr(self) -> str:
        """The sizes, for printing."""
        numbers = f"gamma={self.gamma}, beta={self.beta}, threshold={self.threshold}"
        return f"{self.width}, {self.num_experts}, top_k={self.top_k}, query_width={self.query_width}, {numbers}"
