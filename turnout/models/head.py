"""The output layer of a language model and its loss, a few rows at a time."""

import dataclasses
import functools
import math
from typing import Any

import torch
from torch import Tensor

from turnout.errors import ShapeError, word
from turnout.models.fused import IGNORE, capped, check_targets, plain_loss, token_loss
from turnout.run.composed import composes, slopes, transformed
from turnout.run.product import linear, product
from turnout.types import Routing

__all__ = ["LMLoss", "head_loss"]

# Rows whose logits exist at once. Of fewer, adding to the output layer's gradient takes long beside the products; more
# leave the cache (width 96, 2048 ids, forward and backward: 30 ms at 256 rows, 28 at 512, 32 at 1024, 44 at 4096).
_ROWS = 512
_LOG2_E = 1 / math.log(2)


@dataclasses.dataclass(frozen=True, eq=False)
class LMLoss:
    """How a language model did on targets that it was given.

    Args:
        nats: the sum of the targets' negative log probabilities, a scalar in fp32, or fp64 of a model in fp64.
        routings: as in ``LMOutput``.

    >>> LMLoss(torch.tensor(2.0), ()).nats
    tensor(2.)

    Source: none; plain bookkeeping.
    """

    nats: Tensor
    routings: tuple[Routing, ...]


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, softcap: float | None, keep: bool
    ) -> Tensor:
        of_x, of_weight = (keep and wanted for wanted in ctx.needs_input_grad[:2])
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        nats_T = x_TD.new_empty(len(x_TD), dtype=wide)
        grad_TD = torch.empty_like(x_TD) if of_x else None
        grad_VD = x_TD.new_zeros(weight_VD.shape, dtype=wide) if of_weight else None
        for start in range(0, len(x_TD), _ROWS):
            rows = slice(start, start + _ROWS)
            x_ND, counts_N1 = x_TD[rows], target_T[rows, None] != IGNORE
            chosen_N1, counts_N1 = target_T[rows, None] * counts_N1, counts_N1.to(wide)
            logit_NV = product(x_ND, weight_VD.t()).to(wide)
            # What a softcap lets through of a logit's slope, 1 - tanh^2.
            through_NV = None if softcap is None else 1 - logit_NV.div_(softcap).tanh_().square()
            logit_NV = logit_NV if softcap is None else logit_NV.mul_(softcap)
            peak_N1, logit_N1 = logit_NV.amax(1, keepdim=True), logit_NV.gather(1, chosen_N1)
            # exp by powers of 2: torch's exp takes four times as long on a CPU.
            share_NV = logit_NV.sub_(peak_N1).mul_(_LOG2_E).exp2_()
            sum_N1 = share_NV.sum(1, keepdim=True)
            nats_T[rows] = (peak_N1 + sum_N1.log() - logit_N1).mul_(counts_N1).squeeze(1)
            if grad_TD is None and grad_VD is None:
                continue
            share_NV.mul_(counts_N1 / sum_N1).scatter_add_(1, chosen_N1, -counts_N1)
            share_NV = (share_NV if through_NV is None else share_NV.mul_(through_NV)).to(x_TD.dtype)
            if grad_TD is not None:
                product(share_NV, weight_VD, out_MN=grad_TD[rows])
            if grad_VD is not None:
                grad_VD += product(share_NV.t(), x_ND)
        grads = grad_TD, None if grad_VD is None else grad_VD.to(weight_VD.dtype)
        # What went in is for a second derivative alone.
        ctx.save_for_backward(*grads, x_TD, weight_VD, target_T)
        ctx.composition = functools.partial(_composition, softcap=softcap)
        return nats_T.sum()

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        grad_TD, grad_VD, *inputs = ctx.saved_tensors
        if composes(slope):
            return *slopes(ctx.composition, inputs, (*ctx.needs_input_grad[:2], False), slope)[:2], None, None, None
        return (
            None if grad_TD is None else grad_TD * slope.to(grad_TD.dtype),
            None if grad_VD is None else grad_VD * slope.to(grad_VD.dtype),
            None,
            None,
            None,
        )


def _composition(x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, softcap: float | None) -> Tensor:
    return plain_loss(capped(torch.nn.functional.linear(x_TD, weight_VD), softcap), target_T)


def head_loss(hidden_BSD: Tensor, weight_VD: Tensor, target_BS: Tensor, *, softcap: float | None = None) -> Tensor:
    """``token_loss(linear(hidden_BSD, weight_VD), target_BS)`` without the logits: a few rows of them exist at a time.

    The gradients of both are made in the forward pass, where the logits are, and only multiplied in the backward pass:
    the products are the same three, and two tensors of tokens x vocabulary are never held.

    Args:
        hidden_BSD: (..., D), what the output layer reads.
        weight_VD: (V, D), the output layer.
        target_BS: (...) int64, which token came; -100 for none.
        softcap: where given, a logit l counts as softcap * tanh(l / softcap).

    Returns:
        A scalar in fp32, of fp64 in fp64; 0 where no target counts.

    Raises:
        ShapeError: hidden_BSD and target_BS do not fit each other.
        UsageError: a target is neither a token nor -100 (looked at on a CPU), or they are not int64.

    >>> float(head_loss(torch.zeros(1, 2, 3), torch.ones(4, 3), torch.tensor([[3, -100]])))  # log 4
    1.3862943649291992

    Source: Hsu et al., 2024, "Liger Kernel: Efficient Triton Kernels for LLM Training", its fused linear cross entropy;
    the softcap as Gemma Team, 2024, "Gemma 2".
    """
    if hidden_BSD.shape[:-1] != target_BS.shape:
        got, fix = f"{tuple(hidden_BSD.shape)} and {tuple(target_BS.shape)}", "pass the targets of the same positions"
        allowed = "have the same shape but for the width"
        raise ShapeError(word("hidden_BSD and target_BS", got=got, allowed=allowed, where="head_loss", fix=fix))
    check_targets(target_BS, len(weight_VD), where="head_loss")
    if hidden_BSD.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return token_loss(capped(linear(hidden_BSD, weight_VD), softcap), target_BS)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        hidden_BSD, weight_VD = hidden_BSD.to(dtype), weight_VD.to(dtype)
    with torch.autocast("cpu", enabled=False):
        hidden_TD = hidden_BSD.reshape(-1, hidden_BSD.shape[-1])
        return _HeadLoss.apply(hidden_TD, weight_VD, target_BS.flatten(), softcap, torch.is_grad_enabled())
