"""Rounding with its error made good: what one input's weights lose, those of the inputs after it take over."""

import dataclasses

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.reshape.quantize.codebooks import Codebook
from turnout.reshape.quantize.nearest import Coded, check_scale, check_weight

__all__ = ["gptq"]

_WHERE = "turnout.reshape.quantize.gptq"
# Inputs whose errors are passed on one by one among themselves, and together to all that follow.
_BLOCK = 128


@torch.no_grad()
def gptq(
    weight_NOI: Tensor,
    moment_NII: Tensor,
    book: Codebook,
    group: int,
    *,
    damping: float = 0.01,
    act_order: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Coded:
    """Weights at levels so that |(W - Q) X|^2 is small, input by input, each time making the rest fit anew.

    With H = X X^T + damping mean(diag) 1 and U the upper factor of its inverse, H^-1 = U^T U, input i is rounded and
    the later ones become W_j - (W_i - Q_i) U_ij / U_ii. Scales of a group are those of its weights as they are when it
    begins; with ``act_order``, which takes inputs by their power, those of the weights as they were.

    Args:
        weight_NOI: (N, O, I), N matrices of one shape, finite.
        moment_NII: (N, I, I), the sums of x x^T over the inputs that each has seen; zero for one that has seen none,
            which is rounded to nearest.
        book: the levels.
        group: how many neighbouring inputs share a scale; divides I.
        damping: above 0.
        act_order: whether inputs are rounded in the order of their power rather than as they lie.
        dtype: that scales are rounded to, before weights are.

    Raises:
        ShapeError: shapes that do not fit, or a group that does not divide.
        UsageError: a damping that is not above 0, what is not finite, or a scale too large for its dtype.

    >>> from turnout.reshape.quantize.codebooks import codebook
    >>> from turnout.reshape.quantize.nearest import nearest
    >>> generator = torch.Generator().manual_seed(0)
    >>> weight_NOI, x_TI = (torch.randn(size, generator=generator) for size in ((1, 8, 16), (64, 16)))
    >>> x_TI[:, 1:] += 2 * x_TI[:, :-1]
    >>> coded = gptq(weight_NOI, (x_TI.t() @ x_TI)[None], codebook("int", 4), 16)
    >>> ours = ((weight_NOI - coded.written_out())[0] @ x_TI.t()).norm()
    >>> bool(ours < ((weight_NOI - nearest(weight_NOI, coded.book, 16).written_out())[0] @ x_TI.t()).norm())
    True

    Source: Frantar et al., 2022, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    algorithm 1 with lazy batches. Weights of inputs that were never seen stay what is nearest to them; the released
    code sets them to zero.
    """
    _check(weight_NOI, moment_NII, damping)
    check_weight(weight_NOI, group)
    inner = weight_NOI.shape[2]
    work_NOI, power_NI = weight_NOI.float().clone(), moment_NII.diagonal(dim1=1, dim2=2)
    order_NI = torch.arange(inner, device=work_NOI.device).expand(len(work_NOI), -1)
    fixed = book.scale(weight_NOI, group, dtype) if act_order else None
    if act_order:
        order_NI = power_NI.argsort(dim=1, descending=True, stable=True)
    upper_NII = _upper(moment_NII, order_NI, damping)
    work_NOI = _columns(work_NOI, order_NI)
    scale = torch.empty(*work_NOI.shape[:2], inner // group, device=work_NOI.device) if fixed is None else fixed
    state = _State(work_NOI, upper_NII, scale, fixed is None, order_NI // group, book, group, dtype)
    index_NOI = torch.cat([_block(state, at, min(at + _BLOCK, inner)) for at in range(0, inner, _BLOCK)], 2)
    check_scale(scale, dtype)
    return Coded(_columns(index_NOI, order_NI.argsort(dim=1)), scale, group, book)


@dataclasses.dataclass(frozen=True, eq=False)
class _State:
    """What blocks work on: weights, inputs in their order, with what was passed on to them; and scales as they come."""

    work_NOI: Tensor
    upper_NII: Tensor
    scale_NOG: Tensor
    scales_come: bool
    group_NI: Tensor
    book: Codebook
    group: int
    dtype: torch.dtype


def _block(state: _State, start: int, end: int) -> Tensor:
    """(N, O, B) the codes of the inputs from start to end; their errors are passed on to all inputs after them."""
    work_NOI, upper_NII, group, book = state.work_NOI, state.upper_NII, state.group, state.book
    block_NOB = work_NOI[:, :, start:end].clone()
    error_NOB, index_NOB = torch.empty_like(block_NOB), torch.empty_like(block_NOB, dtype=torch.int64)
    for i in range(start, end):
        at = i - start
        if state.scales_come and i % group == 0:
            here = block_NOB[:, :, at : at + group]
            if i + group > end:  # what lies beyond this block has not heard of its errors yet
                behind = error_NOB[:, :, :at] @ upper_NII[:, start:i, end : i + group]
                here = torch.cat((here, work_NOI[:, :, end : i + group] - behind), 2)
            state.scale_NOG[:, :, i // group] = book.scale(here, group, state.dtype).squeeze(-1)
        own_NO, value_NO = _of(state.scale_NOG, state.group_NI[:, i]), block_NOB[:, :, at]
        index_NOB[:, :, at] = book.index(value_NO, own_NO)
        error_NO = (value_NO - book.value(index_NOB[:, :, at], own_NO)) / upper_NII[:, i, i].unsqueeze(1)
        error_NOB[:, :, at] = error_NO
        block_NOB[:, :, at + 1 :] -= error_NO.unsqueeze(2) * upper_NII[:, i, None, i + 1 : end]
    work_NOI[:, :, end:] -= error_NOB @ upper_NII[:, start:end, end:]
    return index_NOB


def _columns(matrix_NOI: Tensor, order_NI: Tensor) -> Tensor:
    """The inputs in this order."""
    return matrix_NOI.gather(2, order_NI.unsqueeze(1).expand_as(matrix_NOI))


def _of(scale_NOG: Tensor, group_N: Tensor) -> Tensor:
    """(N, O), each matrix's scales of the group named for it."""
    return scale_NOG.gather(2, group_N[:, None, None].expand(-1, scale_NOG.shape[1], 1)).squeeze(2)


def _upper(moment_NII: Tensor, order_NI: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of each inverse, the inputs in this order; inputs never seen are alone."""
    moment_NII = moment_NII.double()
    size = moment_NII.shape[1]
    moment_NII = moment_NII.gather(1, order_NI.unsqueeze(2).expand(-1, -1, size))
    moment_NII = moment_NII.gather(2, order_NI.unsqueeze(1).expand(-1, size, -1))
    power_NI = moment_NII.diagonal(dim1=1, dim2=2)
    mean_N1 = power_NI.mean(1, keepdim=True)
    mean_N1 = torch.where(mean_N1 > 0, mean_N1, 1.0)
    moment_NII = moment_NII + torch.diag_embed(torch.where(power_NI > 0, damping * mean_N1, mean_N1))
    inverse_NII = torch.cholesky_inverse(torch.linalg.cholesky(moment_NII))
    return torch.linalg.cholesky(inverse_NII, upper=True).float()


def _check(weight_NOI: Tensor, moment_NII: Tensor, damping: float) -> None:
    count, inner = weight_NOI.shape[0], weight_NOI.shape[-1]
    if weight_NOI.ndim != 3 or moment_NII.shape != (count, inner, inner):
        got = f"{tuple(weight_NOI.shape)} and {tuple(moment_NII.shape)}"
        allowed, fix = "be (N, O, I) and (N, I, I)", "pass weight[None] and moment[None] for one matrix"
        raise ShapeError(word("weight and moment", got=got, allowed=allowed, where=_WHERE, fix=fix))
    if not 0 < damping < float("inf"):
        raise UsageError(word("damping", got=damping, allowed="be above 0", where=_WHERE, fix="pass damping=0.01"))
    if not bool(torch.isfinite(moment_NII).all()):
        got, fix = "some that are not finite", "calibrate in float32, on text that the model can read"
        raise UsageError(word("the moments of inputs", got=got, allowed="be finite", where=_WHERE, fix=fix))
