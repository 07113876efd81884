"""Padding: rows that are no tokens. Nobody decides about them, and they count nowhere."""

import dataclasses

import torch
from torch import Tensor

from turnout.errors import ShapeError, word
from turnout.types.routing import Routing

__all__ = ["spread"]


def spread(routing: Routing, real_T: Tensor) -> Routing:
    """The routing of tokens that stand among padding, in the rows where ``real_T`` is true; the others are empty.

    Scores, logits and what is carried of padding are 0, and ``Routing.real_T`` says to leave them out.

    Args:
        routing: of the tokens alone.
        real_T: (T,) bool, true where a row is a token; as many as the routing has rows.

    Raises:
        ShapeError: another number of tokens.

    >>> routing = Routing.from_topk(torch.tensor([[1], [0]]), torch.ones(2, 1), num_experts=2)
    >>> spread(routing, torch.tensor([False, True, False, True])).token_R.tolist()
    [3, 1]

    Source: none; plain bookkeeping.
    """
    place_N = real_T.nonzero()[:, 0]
    if real_T.dtype != torch.bool or real_T.ndim != 1 or len(place_N) != routing.num_tokens:
        got = f"{real_T.dtype} of shape {tuple(real_T.shape)}, {len(place_N)} true"
        allowed, fix = f"be (T,) bool with {routing.num_tokens} true", "route x[real_T] first"
        raise ShapeError(word("real_T", got=got, allowed=allowed, where="turnout.types.spread", fix=fix))

    def table(value_NE: Tensor | None) -> Tensor | None:
        if value_NE is None:
            return None
        return value_NE.new_zeros(len(real_T), value_NE.shape[1]).index_copy(0, place_N, value_NE)

    return dataclasses.replace(
        routing,
        token_R=place_N[routing.token_R],
        num_tokens=len(real_T),
        score_TE=table(routing.score_TE),
        logit_TE=table(routing.logit_TE),
        carry_TX=table(routing.carry_TX),
        real_T=real_T,
        entry_R=None,  # no longer K entries a row
        top_k=None,
        before=None if routing.before is None else spread(routing.before, real_T),
    )
