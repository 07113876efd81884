"""The model's element-wise pieces with gradients written by hand: fewer passes over memory, the same numbers."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx

from turnout.errors import ShapeError, UsageError, word
from turnout.run.composed import composes, slopes, transformed
from turnout.types.invariant import alike

__all__ = ["capped", "rms_norm", "token_loss", "turn"]

IGNORE = -100
# Rows of logits handled at once: few enough to stay in the processor's cache from one pass to the next.
_ROWS = 256


def by_hand(*tensors: Tensor) -> bool:
    """Whether the hand-written gradients apply: fp32 on a CPU, traced by no compiler (it fuses better) or transform."""
    suited = all(tensor.dtype == torch.float32 and tensor.device.type == "cpu" for tensor in tensors)
    return suited and not torch.compiler.is_compiling() and not transformed()


def capped(x: Tensor, cap: float | None) -> Tensor:
    """The x held within the cap on either side, cap * tanh(x / cap); x where there is none."""
    return x if cap is None else alike(torch.tanh, x / cap, "the softcap") * cap


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.composition = lambda x, weight: _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        x, weight, inverse = ctx.saved_tensors
        if composes(slope):
            return *slopes(ctx.composition, (x, weight), ctx.needs_input_grad[:2], slope), None
        product = slope * x
        along = (product @ weight).unsqueeze(-1) * (inverse.pow(3) / -x.shape[-1])
        of_weight = product.mul_(inverse).flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        return (slope * inverse).mul_(weight).addcmul_(x, along), of_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The normed x, weight * x / sqrt(mean(x^2) + eps) over the last axis, in fp32 up to the weight."""
    if by_hand(x, weight) and torch.is_grad_enabled():
        return _Norm.apply(x, weight, eps)
    return _normed(x, weight, eps)


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)


class _Turn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
        ctx.save_for_backward(cos_SP, sin_SP)
        return _turned(x_BSHP, cos_SP, sin_SP, 1)

    @staticmethod
    def backward(ctx, slope_BSHP: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        cos_SP, sin_SP = ctx.saved_tensors
        if composes(slope_BSHP):
            return turn(slope_BSHP, cos_SP, -sin_SP), None, None
        return _turned(slope_BSHP, cos_SP, sin_SP, -1), None, None


def _turned(x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor, way: int) -> Tensor:
    cos_S1P, sin_S1P = cos_SP.unsqueeze(-2), sin_SP.unsqueeze(-2)
    out_BSHP = x_BSHP.new_empty(x_BSHP.shape)
    (a, b), (first, second) = x_BSHP.chunk(2, dim=-1), out_BSHP.chunk(2, dim=-1)
    torch.mul(a, cos_S1P, out=first).addcmul_(b, sin_S1P, value=-way)
    torch.mul(b, cos_S1P, out=second).addcmul_(a, sin_S1P, value=way)
    return out_BSHP


def turn(x_BSHP: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """The heads turned, pair i being positions i and i + P of each head (2P wide)."""
    fixed = not cos_SP.requires_grad and not sin_SP.requires_grad  # the angles' gradients are not written by hand
    if fixed and by_hand(x_BSHP, cos_SP, sin_SP) and torch.is_grad_enabled():
        return _Turn.apply(x_BSHP, cos_SP, sin_SP)
    cos_S1P, sin_S1P = cos_SP.unsqueeze(-2), sin_SP.unsqueeze(-2)
    a, b = x_BSHP.chunk(2, dim=-1)
    return torch.cat((a * cos_S1P - b * sin_S1P, b * cos_S1P + a * sin_S1P), dim=-1)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, logit_TV: Tensor, target_T: Tensor) -> Tensor:
        wide = torch.promote_types(logit_TV.dtype, torch.float32)
        total_T = logit_TV.new_empty(len(logit_TV), dtype=wide)
        for rows in range(0, len(logit_TV), _ROWS):
            total_T[rows : rows + _ROWS] = logit_TV[rows : rows + _ROWS].to(wide).logsumexp(1)
        ctx.save_for_backward(logit_TV, target_T, total_T)
        chosen_T = logit_TV.gather(1, _chosen(target_T).unsqueeze(1)).squeeze(1).to(wide)
        return (total_T - chosen_T).mul_(target_T != IGNORE).sum()

    @staticmethod
    def backward(ctx, slope: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        logit_TV, target_T, total_T = ctx.saved_tensors
        if composes(slope):
            return *slopes(plain_loss, (logit_TV, target_T), (True, False), slope)[:1], None
        weight_T1 = ((target_T != IGNORE) * slope).unsqueeze(1)
        grad_TV = torch.empty_like(logit_TV)
        for start in range(0, len(logit_TV), _ROWS):
            rows = slice(start, start + _ROWS)
            share_TV = (logit_TV[rows].to(total_T.dtype) - total_T[rows, None]).exp_()
            share_TV.mul_(weight_T1[rows]).scatter_add_(1, _chosen(target_T[rows, None]), -weight_T1[rows])
            grad_TV[rows] = share_TV
        return grad_TV, None


def _chosen(target: Tensor) -> Tensor:
    """The targets, and some token in the place of none."""
    return target.masked_fill(target == IGNORE, 0)


def plain_loss(logit_TV: Tensor, target_T: Tensor) -> Tensor:
    """The same loss by torch's own operations."""
    wide_TV = logit_TV.to(torch.promote_types(logit_TV.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide_TV, target_T, ignore_index=IGNORE, reduction="sum")


def check_targets(target_BS: Tensor, vocab_size: int, *, where: str) -> None:
    """Raises unless every target is a token or ``IGNORE``; on an accelerator torch itself looks."""
    if target_BS.dtype != torch.int64:
        got, fix = str(target_BS.dtype), "pass targets.long()"
        raise UsageError(word("the dtype of the targets", got=got, allowed="be torch.int64", where=where, fix=fix))
    if target_BS.device.type != "cpu" or not target_BS.numel() or torch.compiler.is_compiling() or transformed():
        return
    least, most = (int(bound) for bound in target_BS.aminmax())
    if least < 0:
        least = int(target_BS.masked_fill(target_BS == IGNORE, 0).amin())
    if least < 0 or most >= vocab_size:
        got, fix = f"{least if least < 0 else most}", f"set what is not to count to {IGNORE}"
        allowed = f"be from 0 to {vocab_size - 1}, or {IGNORE} for none"
        raise UsageError(word("a target", got=got, allowed=allowed, where=where, fix=fix))


def token_loss(logits_BSV: Tensor, target_BS: Tensor) -> Tensor:
    """The sum of the targets' negative log probabilities, in nats; targets of -100 do not count.

    The same as ``cross_entropy(..., reduction="sum")`` in fp32 (of fp64 in fp64), at 0.6 of the time and half of the
    memory on a CPU: neither the probabilities nor fp32 copies of bf16 logits are ever held, a few rows at a time are.

    Args:
        logits_BSV: (..., V) the scores of every next token, in any floating dtype.
        target_BS: (...) int64, which token came; -100 for none.

    Returns:
        A scalar in fp32, of fp64 in fp64; 0 where no target counts.

    Raises:
        ShapeError: the two do not fit each other.
        UsageError: a target is neither a token nor -100 (looked at on a CPU), or they are not int64.

    >>> float(token_loss(torch.zeros(1, 2, 4), torch.tensor([[3, -100]])))  # log 4
    1.3862943649291992

    Source: none; the usual loss. In pieces as Wijmans et al., 2024, "Cut Your Losses in Large-Vocabulary Language
    Models", but with the logits held, not recomputed.
    """
    if logits_BSV.shape[:-1] != target_BS.shape:
        got, fix = f"{tuple(logits_BSV.shape)} and {tuple(target_BS.shape)}", "pass the targets of the same positions"
        allowed = "have the same shape but for the vocabulary"
        raise ShapeError(word("logits_BSV and target_BS", got=got, allowed=allowed, where="token_loss", fix=fix))
    logit_TV, target_T = logits_BSV.flatten(0, -2), target_BS.flatten()
    check_targets(target_T, logit_TV.shape[1], where="token_loss")
    if logit_TV.device.type != "cpu" or torch.compiler.is_compiling() or transformed():
        return plain_loss(logit_TV, target_T)
    return _Loss.apply(logit_TV, target_T)
