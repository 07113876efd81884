"""Losses that keep routers even and their logits small; the training loop weighs them, explicitly.

Both take the routing of one layer. Average over layers what they return: a loss over pooled layers calls it even
when half the experts of every layer are dead, as long as they are different halves.
"""

import dataclasses

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.expects import expects
from turnout.types import Routing

__all__ = ["Whole", "demand", "load_balance_loss", "router_z_loss", "score_sum"]


@dataclasses.dataclass(frozen=True, eq=False)
class Whole:
    """Of a batch that processes share, what each of them must know of all rows to count its own part of a loss.

    Args:
        chosen_E: (E,) how many tokens of all processes chose each expert, before capacity.
        tokens: a scalar, how many tokens of all processes count.

    >>> Whole(torch.tensor([3, 1]), torch.tensor(4)).tokens.item()
    4

    Source: none; plain bookkeeping.
    """

    chosen_E: Tensor
    tokens: Tensor


def demand(routing: Routing) -> Tensor:
    """(E,) how many tokens chose each expert, before capacity took its share.

    Source: none; plain bookkeeping.
    """
    return routing.load_E if routing.wanted_E is None else routing.wanted_E


def score_sum(routing: Routing, *, mask_T: Tensor | None = None) -> Tensor:
    """(E,) the sum over the tokens that count of their scores, each token's scaled to sum to 1.

    Args:
        routing: of one layer, with ``score_TE``.
        mask_T: as for ``load_balance_loss``.

    Raises:
        UsageError: the routing has no scores (``Hash``).

    Source: as ``load_balance_loss``.
    """
    score_TE = _need(routing.score_TE, "scores", "turnout.train.balance.load_balance_loss")
    tiny = torch.finfo(score_TE.dtype).tiny
    share_TE = score_TE / score_TE.sum(1, keepdim=True).clamp_min(tiny)
    mask_T = _counted(mask_T, routing)
    return (share_TE if mask_T is None else share_TE.masked_fill(~mask_T.unsqueeze(1), 0)).sum(0)


@expects(routing=Routing)
def load_balance_loss(routing: Routing, *, mask_T: Tensor | None = None, whole: Whole | None = None) -> Tensor:
    """How uneven one layer's routing is: 1 when load and scores are even, E when one expert gets everything.

    E * sum_e f_e P_e, with f_e the share of the (token, expert) choices that fell on expert e, before capacity and
    outside the gradient, and P_e the mean over tokens of the scores, each token's scaled to sum to 1.

    Args:
        routing: of one layer, with ``score_TE``.
        mask_T: (T,) bool, true for the tokens that count. What ``routing.real_T`` calls padding never does.
        whole: of the batch that this routing is a part of; what comes out is then this part's share of the loss of the
            whole, and the shares of all parts add up to it.

    Returns:
        A scalar in fp32, at least 0; its gradient reaches the router through the scores. 0 when no token counts.

    Raises:
        ShapeError: mask_T is not (T,).
        UsageError: the routing has no scores (``Hash``), or mask_T is given for a truncated routing from disk.

    >>> routing = Routing.from_topk(
    ...     torch.tensor([[0], [1]]), torch.ones(2, 1), num_experts=2, score_TE=torch.tensor([[0.9, 0.1], [0.1, 0.9]])
    ... )
    >>> load_balance_loss(routing).item(), load_balance_loss(routing, mask_T=torch.tensor([True, False])).item()
    (1.0, 1.7999999523162842)

    Source: Fedus et al., 2021, "Switch Transformers", equation 4, over K choices a token instead of one. Scores that do
    not sum to 1 (sigmoid) are scaled first, as DeepSeek-AI, 2024, "DeepSeek-V3", equation 19; unscaled, the router
    could lower the loss by lowering all of its scores. Over a whole step (``TrainConfig.balance_scope``): Qiu et al.,
    2025, "Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized Mixture-of-Expert Models".
    """
    mask_T = _counted(mask_T, routing)
    score_E = score_sum(routing, mask_T=mask_T)
    chosen_E = (_chosen(routing, mask_T) if whole is None else whole.chosen_E).to(score_E.dtype)
    if whole is not None:
        mean_E = score_E / whole.tokens.clamp_min(1)
    else:
        mean_E = score_E / (max(routing.num_tokens, 1) if mask_T is None else mask_T.sum().clamp_min(1))
    return routing.num_experts * (chosen_E / chosen_E.sum().clamp_min(1) * mean_E).sum()


@expects(routing=Routing)
def router_z_loss(routing: Routing, *, mask_T: Tensor | None = None, whole: Whole | None = None) -> Tensor:
    """How large one layer's logits are: the mean over tokens of (log sum_e exp logit_e)^2.

    Args:
        routing: of one layer, with ``logit_TE``.
        mask_T: (T,) bool, true for the tokens that count. What ``routing.real_T`` calls padding never does.
        whole: of the batch that this routing is a part of; what comes out is then this part's share of the loss of the
            whole, and the shares of all parts add up to it.

    Returns:
        A scalar in fp32, at least 0; its gradient reaches the router through the logits. 0 when no token counts.

    Raises:
        ShapeError: mask_T is not (T,).
        UsageError: the routing has no logits (``Hash``).

    >>> routing = Routing.from_topk(torch.tensor([[0]]), torch.ones(1, 1), num_experts=2, logit_TE=torch.zeros(1, 2))
    >>> router_z_loss(routing)  # ln(2) squared
    tensor(0.4805)

    Source: Zoph et al., 2022, "ST-MoE: Designing Stable and Transferable Sparse Expert Models", equation 5.
    """
    logit_TE = _need(routing.logit_TE, "logits", "turnout.train.balance.router_z_loss")
    mask_T = _counted(mask_T, routing)
    square_T = logit_TE.logsumexp(1).square()
    if whole is not None:
        counted_T = square_T if mask_T is None else square_T.masked_fill(~mask_T, 0)
        return counted_T.sum() / whole.tokens.clamp_min(1)
    if mask_T is None:
        return square_T.sum() / max(routing.num_tokens, 1)
    return square_T.masked_fill(~mask_T, 0).sum() / mask_T.sum().clamp_min(1)


def _chosen(routing: Routing, mask_T: Tensor | None) -> Tensor:
    """(E,) how many of the counted tokens chose each expert, before capacity truncated the routing."""
    if mask_T is None or mask_T is routing.real_T:  # padding has no entries
        return demand(routing)
    if routing.wanted_E is not None and routing.before is None:
        raise UsageError(
            word(
                "mask_T",
                got="a mask for a truncated routing that no longer knows whom it dropped",
                allowed="be None here",
                where="turnout.train.balance.load_balance_loss",
                fix="pass the routing as the router returned it, not one read from disk",
            )
        )
    whole = routing.before or routing
    count_E = torch.zeros_like(whole.load_E)
    return count_E.index_add_(0, whole.expert_R, mask_T[whole.token_R].to(count_E.dtype))


def _need(table_TE: Tensor | None, name: str, where: str) -> Tensor:
    if table_TE is None:
        raise UsageError(
            word(
                f"the routing's {name}",
                got="none",
                allowed="be there",
                where=where,
                fix="set this loss's weight to 0 for a router without scores, such as Hash",
            )
        )
    return table_TE


def _counted(mask_T: Tensor | None, routing: Routing) -> Tensor | None:
    """(T,) which rows count: those of the mask that are no padding; None where all do."""
    if mask_T is None:
        return routing.real_T
    if mask_T.shape != (routing.num_tokens,) or mask_T.dtype != torch.bool:
        raise ShapeError(
            word(
                "mask_T",
                got=f"{mask_T.dtype} of shape {tuple(mask_T.shape)}",
                allowed=f"be bool of shape ({routing.num_tokens},)",
                where="turnout.train.balance",
                fix="pass (attention_mask != 0).flatten()",
            )
        )
    return mask_T if routing.real_T is None else mask_T & routing.real_T
