"""The two products of the forward pass: up with gather and activation, and rows times their expert's matrix."""

import triton
import triton.language as tl
from torch import Tensor

from turnout.run.kernels.dispatch import Tiles, fetched, multiplied, place
from turnout.run.kernels.tune import INTERPRETED, configs, precision, pruned
from turnout.types import ExpertWeights

__all__ = ["activated", "layout", "product", "raised", "up"]


# TODO: tensor descriptors (TMA) for the weights and for rows that need no gather, and a persistent grid: when
# benchmarks/gpu_layer.py, on a GPU, puts a layer below 70 % of the dense rate. Hopper's copy engine cannot gather.

_UP = configs((128, 64, 8, 3), (128, 64, 8, 4), (128, 32, 8, 4), (64, 64, 4, 3), (64, 64, 4, 4), (32, 128, 4, 3))
_ROWS = configs(
    (256, 64, 8, 3), (256, 64, 8, 4), (128, 64, 8, 4), (128, 64, 4, 4), (128, 128, 4, 3), (128, 32, 8, 4),
    (64, 128, 4, 4), (32, 64, 4, 4),
)  # fmt: skip


@triton.jit
def activated(h, KIND: tl.constexpr):
    """g(h) in fp32; a NaN stays one."""
    if KIND == "silu":
        out = h / (1.0 + tl.exp(-h))
    elif KIND == "gelu":
        out = 0.5 * h * (1.0 + tl.math.erf(h * 0.7071067811865476))
    elif KIND == "gelu_tanh":  # (1 + tanh(u)) / 2 is the sigmoid of 2u
        out = h / (1.0 + tl.exp(-1.5957691216057308 * h * (1.0 + 0.044715 * h * h)))
    elif KIND == "oai":
        h = tl.where(h > 7.0, 7.0, h)
        out = h / (1.0 + tl.exp(-1.702 * h))
    else:
        out = tl.where(h < 0, 0.0, h)
    return out


@triton.jit
def raised(v, KIND: tl.constexpr):
    """What the gate is multiplied with: the value, clamped and one more where the activation has it so."""
    if KIND == "oai":
        v = tl.where(v > 7.0, 7.0, tl.where(v < -7.0, -7.0, v)) + 1.0
    return v


@triton.autotune(_UP, key=["IN", "OUT", "BLOCK_M", "GATED", "KEEP", "stride_ui"], prune_configs_by=pruned(products=2))
@triton.jit
def _up_kernel(
    left_ptr, token_ptr, weight_ptr, up_ptr, bias_ptr, hidden_ptr, active_ptr,
    tile_ptr, row_ptr, offset_ptr, count, stride_xt, stride_ue, stride_ui, stride_uo, stride_be, stride_bo,
    IN: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr, STEP: tl.constexpr, VALUE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    e, row, inside, column = place(tile_ptr, row_ptr, offset_ptr, count, (OUT + BLOCK_N - 1) // BLOCK_N, BLOCK_M, 8)
    if e < 0:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    i = tl.arange(0, BLOCK_M)
    # Rows past the expert's end read token 0, which is valid memory, and are not written.
    token = tl.load(token_ptr + row + i, mask=inside, other=0)
    left_ptrs = left_ptr + token[:, None] * stride_xt + k[None, :]
    gate_ptrs = up_ptr + e * stride_ue + k[:, None] * stride_ui + (n * STEP)[None, :] * stride_uo
    value_ptrs = up_ptr + e * stride_ue + k[:, None] * stride_ui + (n * STEP + VALUE)[None, :] * stride_uo
    gate = tl.full((BLOCK_M, BLOCK_N), 0.0, dtype=tl.float32)
    value = tl.full((BLOCK_M, BLOCK_N), 0.0, dtype=tl.float32)
    for k0 in range(0, IN, BLOCK_K):
        x, w = fetched(left_ptrs, gate_ptrs, k, n, IN - k0, OUT, IN % BLOCK_K == 0 and OUT % BLOCK_N == 0, WIDEN)
        gate = tl.dot(x, w, gate, input_precision=PRECISION)
        if GATED:
            if IN % BLOCK_K == 0 and OUT % BLOCK_N == 0:
                v = tl.load(value_ptrs)
            else:
                v = tl.load(value_ptrs, mask=(k < IN - k0)[:, None] & (n < OUT)[None, :], other=0.0)
            if WIDEN:
                v = v.to(tl.float32)
            value = tl.dot(x, v, value, input_precision=PRECISION)
            value_ptrs += BLOCK_K * stride_ui
        left_ptrs += BLOCK_K
        gate_ptrs += BLOCK_K * stride_ui
    if HAS_BIAS:
        bias_ptrs = bias_ptr + e * stride_be + n * STEP * stride_bo
        gate += tl.load(bias_ptrs, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
        if GATED:
            value += tl.load(bias_ptrs + VALUE * stride_bo, mask=n < OUT, other=0.0).to(tl.float32)[None, :]
    written = inside[:, None] & (n < OUT)[None, :]
    if KEEP:
        wide = 2 * OUT if GATED else OUT
        hidden_ptrs = hidden_ptr + row * wide + i[:, None] * wide + (n * STEP)[None, :]
        tl.store(hidden_ptrs, gate, mask=written)
        if GATED:
            tl.store(hidden_ptrs + VALUE, value, mask=written)
    active = activated(gate, KIND)
    if GATED:
        active *= raised(value, KIND)
    weight = tl.load(weight_ptr + row + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(active_ptr + row * OUT + i[:, None] * OUT + n[None, :], active * weight[:, None], mask=written)


def layout(weights: ExpertWeights) -> dict[str, int]:
    """Where gate n and its value lie in the up product: at n * STEP, and VALUE columns on."""
    return {"STEP": 2, "VALUE": 1} if weights.gated and weights.interleaved else {"STEP": 1, "VALUE": weights.hidden}


def up(
    x_TD: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    weights: ExpertWeights,
    offset_E: Tensor,
    tiled: Tiles,
    *,
    kind: str,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """(R, F) weight_R * act(x[token_R] @ up[e] + bias[e]), and the (R, H) product before it when ``keep``."""
    table, block_m = tiled
    rows, width, hidden, wide = token_R.numel(), weights.width, weights.hidden, weights.up_EDH.shape[2]
    active_RF = x_TD.new_empty(rows, hidden)
    hidden_RH = x_TD.new_empty(rows, wide) if keep else None
    bias = weights.up_bias_EH

    def grid(meta: dict) -> tuple[int]:
        return (table.shape[1] * triton.cdiv(hidden, meta["BLOCK_N"]),)

    _up_kernel[grid](
        x_TD, token_R, weight_R, weights.up_EDH, bias, hidden_RH, active_RF,
        table[0], table[1], offset_E, table.shape[1], x_TD.stride(0), *weights.up_EDH.stride(),
        *(bias.stride() if bias is not None else (0, 0)),
        IN=width, OUT=hidden, KIND=kind, GATED=weights.gated, HAS_BIAS=bias is not None, KEEP=keep,
        PRECISION=precision(x_TD.dtype), WIDEN=INTERPRETED, BLOCK_M=block_m, **layout(weights),
    )  # fmt: skip
    return active_RF, hidden_RH


@triton.autotune(_ROWS, key=["IN", "OUT", "BLOCK_M", "stride_si"], prune_configs_by=pruned())
@triton.jit
def _rows_kernel(
    left_ptr, weight_ptr, stack_ptr, bias_ptr, out_ptr,
    tile_ptr, row_ptr, offset_ptr, count, stride_se, stride_si, stride_so, stride_be, stride_bo,
    IN: tl.constexpr, OUT: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    e, row, inside, column = place(tile_ptr, row_ptr, offset_ptr, count, (OUT + BLOCK_N - 1) // BLOCK_N, BLOCK_M, 8)
    if e < 0:
        return
    n = column * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    i = tl.arange(0, BLOCK_M)
    # Rows past the expert's end read its first one, which is valid memory, and are not written.
    left_ptrs = left_ptr + row * IN + tl.where(inside, i, 0)[:, None] * IN + k[None, :]
    right_ptrs = stack_ptr + e * stride_se + k[:, None] * stride_si + n[None, :] * stride_so
    total = multiplied(left_ptrs, right_ptrs, k, n, stride_si, IN, OUT, PRECISION, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + e * stride_be + n * stride_bo, mask=n < OUT, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + row + i, mask=inside, other=0.0).to(tl.float32)
        total += weight[:, None] * bias[None, :]
    tl.store(out_ptr + row * OUT + i[:, None] * OUT + n[None, :], total, mask=inside[:, None] & (n < OUT)[None, :])


def product(
    rows_RI: Tensor,
    stack_EIO: Tensor,
    offset_E: Tensor,
    tiled: Tiles,
    *,
    bias_EO: Tensor | None = None,
    weight_R: Tensor | None = None,
) -> Tensor:
    """(R, O), each contiguous row times its expert's matrix of any strides, plus weight_R times its bias."""
    table, block_m = tiled
    outer = stack_EIO.shape[2]
    out_RO = rows_RI.new_empty(rows_RI.shape[0], outer)

    def grid(meta: dict) -> tuple[int]:
        return (table.shape[1] * triton.cdiv(outer, meta["BLOCK_N"]),)

    _rows_kernel[grid](
        rows_RI, weight_R, stack_EIO, bias_EO, out_RO,
        table[0], table[1], offset_E, table.shape[1], *stack_EIO.stride(),
        *(bias_EO.stride() if bias_EO is not None else (0, 0)),
        IN=rows_RI.shape[1], OUT=outer, HAS_BIAS=bias_EO is not None,
        PRECISION=precision(rows_RI.dtype), WIDEN=INTERPRETED, BLOCK_M=block_m,
    )  # fmt: skip
    return out_RO
