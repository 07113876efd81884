"""The executor over the Triton kernels, and its gradient. Importing this file imports no Triton."""

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from turnout.errors import MissingExtraError, UsageError, word
from turnout.run.composed import composes, slopes
from turnout.run.reference import as_reference, by_reference, prepare, uncompiled
from turnout.types import ExpertWeights, Routing

__all__ = ["kernels"]

_KIND = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "silu": "silu", "gelu": "gelu", "relu": "relu"}
_KIND |= {"swiglu_oai": "oai", "geglu_tanh": "gelu_tanh", "gelu_tanh": "gelu_tanh"}


def _check(x_TD: Tensor) -> None:
    """Raises unless these kernels can take x."""
    where = "turnout.run.kernels"
    if x_TD.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UsageError(
            word(
                "the dtype",
                got=str(x_TD.dtype),
                allowed="be float32, bfloat16 or float16",
                where=where,
                fix="pass backend='sort', which takes any floating dtype",
            )
        )
    if x_TD.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(
            word(
                "the device",
                got=str(x_TD.device),
                allowed="be cuda, or TRITON_INTERPRET=1 be set before the start, for Triton's slow interpreter",
                where=where,
                fix="pass backend='sort'",
            )
        )
    if importlib.util.find_spec("triton") is None:
        raise MissingExtraError(
            word(
                "triton",
                got="no such package",
                allowed="be installed",
                where=where,
                fix="pip install 'turnout[triton]' (torch for CUDA on Linux brings it), or pass backend='sort'",
            )
        )


@uncompiled
@as_reference
def kernels(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Tensor:
    """Each token's weighted sum of its experts' outputs, by grouped products in Triton on a GPU.

    The gather of tokens is part of the products that need it, and activation, biases and combine weights are part of
    their ends; one more kernel sums each token's rows, always in the same order. Only x and the up product are kept
    for the backward pass. The host waits for nothing, whatever the load. Products sum in fp32; fp32 operands are
    taken exactly unless ``torch.set_float32_matmul_precision`` allows TF32. Further derivatives, and those of
    torch.func, are ``reference``'s.

    Args:
        x_TD: (T, D), the tokens, in fp32, bf16 or fp16, on a CUDA device.
        routing: which experts each takes, and with what weight.
        weights: the experts; any strides, without a copy.

    Returns:
        (T, D) in x's dtype; tokens without entries are zero.

    Raises:
        ShapeError: the three do not fit each other.
        UsageError: their dtypes differ and autocast is off, the dtype is another, or x is not on a CUDA device.
        MissingExtraError: Triton is not installed.

    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> kernels(torch.ones(1, 3), routing, weights)
    Traceback (most recent call last):
    turnout.errors.UsageError: the device must be cuda, or TRITON_INTERPRET=1 be set ...

    Source: Tan et al., 2024, "Scattered Mixture-of-Experts Implementation", for the gather in the product; Guo et al.,
    2025, "SonicMoE: Accelerating MoE with IO and Tile-aware Optimizations", for keeping only x and the up product and
    for the gradient of the combine weight from the second product's slope. We write rows and sum them by token
    instead of scattering.
    """
    dtype = x_TD.dtype
    x_TD, weights = prepare(x_TD, routing, weights)
    _check(x_TD)
    stacks = _near(weights.up_EDH), _near(weights.down_EFD), weights.up_bias_EH, weights.down_bias_ED
    tensors = (x_TD, routing.weight_R, *stacks)
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    with torch.autocast(x_TD.device.type, enabled=False), torch.cuda.device_of(x_TD):
        return _Layer.apply(*tensors, routing, weights.activation, weights.interleaved, keep).to(dtype)


def _near(stack: Tensor) -> Tensor:
    """With less than 2^31 elements between the first and the last of one matrix, which 32 bits then address.

    Only a stack whose experts are interleaved and which is that large is copied.
    """
    _, high, wide = stack.shape
    span = (high - 1) * stack.stride(1) + (wide - 1) * stack.stride(2)
    return stack if span < 2**31 else stack.contiguous()


def _dense_rows(tensor: Tensor) -> Tensor:
    """With contiguous rows, for loads of many bytes at a time: a copy of an expanded or transposed tensor."""
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_R: Tensor, *rest: Any) -> Tensor:
        *stacks, routing, activation, interleaved, keep = rest
        weights = ExpertWeights(*stacks, activation=activation, interleaved=interleaved)
        ctx.activation, ctx.interleaved, ctx.rows = activation, interleaved, routing.num_entries
        ctx.routing = routing.detach()
        if ctx.rows == 0:
            ctx.save_for_backward(x_TD, weight_R, *stacks)
            return torch.zeros_like(x_TD, memory_format=torch.contiguous_format)
        from turnout.run.kernels import dispatch, forward, tune

        token_R, offset_E = routing.token_R.contiguous(), routing.offset_E.contiguous()
        order_R, start_T = routing.by_token
        top_k = routing.top_k if routing.entry_R is not None else 0
        rows_TD, plain_R = _dense_rows(x_TD), weight_R.contiguous()
        tiled = dispatch.tiles(offset_E, ctx.rows, tune.tile_rows(ctx.rows, weights.num_experts))
        active_RF, hidden_RH = forward.up(
            rows_TD, token_R, plain_R, weights, offset_E, tiled, kind=_KIND[activation], keep=keep
        )
        out_RD = forward.product(
            active_RF, weights.down_EFD, offset_E, tiled, bias_EO=weights.down_bias_ED, weight_R=plain_R
        )
        if keep:
            ctx.block_m, ctx.top_k = tiled[1], top_k
            ctx.save_for_backward(x_TD, weight_R, *stacks, hidden_RH, token_R, offset_E, order_R, start_T, tiled[0])
        return dispatch.combine(out_RD, order_R, start_T, top_k)

    @staticmethod
    def backward(ctx: Any, slope_TD: Tensor) -> Any:  # pyrefly: ignore[bad-override] - torch declares *grads
        x_TD, weight_R, *stacks = ctx.saved_tensors[:6]
        needed = ctx.needs_input_grad[:6]
        if composes(slope_TD):
            composition = by_reference(ctx.routing, ctx.activation, ctx.interleaved)
            return *slopes(composition, (x_TD, weight_R, *stacks), needed, slope_TD), None, None, None, None
        if ctx.rows == 0:
            inputs = (x_TD, weight_R, *stacks)
            zeros = (torch.zeros_like(t) if need else None for t, need in zip(inputs, needed, strict=True))
            return *zeros, None, None, None, None
        with torch.cuda.device_of(x_TD):
            weights = ExpertWeights(*stacks, activation=ctx.activation, interleaved=ctx.interleaved)
            found = _slopes(ctx, _dense_rows(x_TD), weight_R, weights, _dense_rows(slope_TD), needed)
            return *found, None, None, None, None


def _slopes(
    ctx: Any,
    x_TD: Tensor,
    weight_R: Tensor,
    weights: ExpertWeights,
    slope_TD: Tensor,
    needed: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight_R, up, down and the two biases, where they are needed."""
    from turnout.run.kernels import backward, dispatch, forward

    hidden_RH, token_R, offset_E, order_R, start_T, table = ctx.saved_tensors[6:]
    tiled = (table, ctx.block_m)
    of_x, of_weight, of_up, of_down, of_up_bias, of_down_bias = needed
    plain_R, out = weight_R.contiguous(), dict.fromkeys(("x", "weight", "up", "down", "up_bias", "down_bias"))
    if of_x or of_weight or of_up or of_down or of_up_bias:
        slope_RH, active_RF, dots_NR = backward.hidden_slope(
            slope_TD, hidden_RH, token_R, plain_R, weights, offset_E, tiled, kind=_KIND[ctx.activation]
        )
        if of_weight:
            if weights.down_bias_ED is not None:
                dots_NR = torch.cat([dots_NR, dots_NR.new_empty(1, ctx.rows)])
                dispatch.row_dots(slope_TD, token_R, weights.down_bias_ED, offset_E, tiled, dots_NR[-1])
            out["weight"] = dots_NR.sum(0).to(weight_R.dtype)
        if of_down:
            out["down"] = backward.stack_slope(active_RF, slope_TD, weights.down_EFD, token_R, offset_E, gather="right")
        del active_RF, dots_NR
        if of_up:
            out["up"] = backward.stack_slope(x_TD, slope_RH, weights.up_EDH, token_R, offset_E, gather="left")
        if of_up_bias and weights.up_bias_EH is not None:
            out["up_bias"] = dispatch.column_sums(slope_RH, offset_E, weights.up_bias_EH.dtype)
        if of_x:
            rows_RD = forward.product(slope_RH, weights.up_EDH.transpose(1, 2), offset_E, tiled)
            out["x"] = dispatch.combine(rows_RD, order_R, start_T, ctx.top_k)
    if of_down_bias and weights.down_bias_ED is not None:
        out["down_bias"] = dispatch.column_sums(
            slope_TD, offset_E, weights.down_bias_ED.dtype, token_R=token_R, weight_R=plain_R
        )
    return tuple(out.values())
