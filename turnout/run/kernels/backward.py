"""The backward pass: through the second product and the activation, and each expert's weight gradient."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from turnout.run.kernels.dispatch import Tiles, multiplied, place
from turnout.run.kernels.forward import activated, layout, raised
from turnout.run.kernels.tune import INTERPRETED, configs, precision, pruned
from turnout.types import ExpertWeights

__all__ = ["hidden_slope", "stack_slope"]

_HIDDEN = configs((None, 64, 8, 3), (None, 64, 8, 4), (None, 32, 8, 4), (None, 64, 4, 3), (None, 128, 4, 2))
_STACK = configs((256, 64, 8, 3), (256, 32, 8, 4), (128, 64, 8, 3), (128, 64, 4, 3), (128, 32, 4, 4), (64, 64, 4, 3))


@triton.jit
def _slope(h, KIND: tl.constexpr):
    """g'(h) in fp32; that of relu is 0 at 0, that of a clamped gate 0 above its limit."""
    if KIND == "silu":
        s = 1.0 / (1.0 + tl.exp(-h))
        out = s * (1.0 + h * (1.0 - s))
    elif KIND == "gelu":
        out = 0.5 * (1.0 + tl.math.erf(h * 0.7071067811865476)) + h * 0.3989422804014327 * tl.exp(-0.5 * h * h)
    elif KIND == "gelu_tanh":
        s = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * h * (1.0 + 0.044715 * h * h)))
        out = s * (1.0 + h * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * h * h))
    elif KIND == "oai":
        s = 1.0 / (1.0 + tl.exp(-1.702 * h))
        out = tl.where(h > 7.0, 0.0, s * (1.0 + 1.702 * h * (1.0 - s)))
    else:
        out = tl.where(h > 0, 1.0, 0.0)
    return out


@triton.jit
def _through(
    total, weight, hidden_ptr, slope_ptr, active_ptr, i, n, inside,
    OUT: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr, STEP: tl.constexpr, VALUE: tl.constexpr,
):  # fmt: skip
    """Through the activation: writes the gradient of the up product and the weighted activation, gives row dots."""
    written = inside[:, None] & (n < OUT)[None, :]
    at = i[:, None] * (2 * OUT if GATED else OUT) + (n * STEP)[None, :]
    gate = tl.load(hidden_ptr + at, mask=written, other=0.0).to(tl.float32)
    active = activated(gate, KIND)
    slope = _slope(gate, KIND)
    if GATED:
        value = tl.load(hidden_ptr + at + VALUE, mask=written, other=0.0).to(tl.float32)
        through = total * weight[:, None] * active
        if KIND == "oai":
            through = tl.where((value > 7.0) | (value < -7.0), 0.0, through)
        tl.store(slope_ptr + at + VALUE, through, mask=written)
        active *= raised(value, KIND)
        slope *= raised(value, KIND)
    tl.store(slope_ptr + at, total * weight[:, None] * slope, mask=written)
    tl.store(active_ptr + i[:, None] * OUT + n[None, :], active * weight[:, None], mask=written)
    return tl.sum(total * active, 1)


@triton.autotune(_HIDDEN, key=["IN", "OUT", "BLOCK_M", "GATED", "stride_di"], prune_configs_by=pruned())
@triton.jit(do_not_specialize=["rows"])
def _hidden_kernel(
    left_ptr, token_ptr, weight_ptr, down_ptr, hidden_ptr, slope_ptr, active_ptr, dots_ptr,
    tile_ptr, row_ptr, offset_ptr, count, rows, stride_yt, stride_de, stride_di, stride_do,
    IN: tl.constexpr, OUT: tl.constexpr, KIND: tl.constexpr, GATED: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, STEP: tl.constexpr, VALUE: tl.constexpr,
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
    left_ptrs = left_ptr + token[:, None] * stride_yt + k[None, :]
    right_ptrs = down_ptr + e * stride_de + k[:, None] * stride_di + n[None, :] * stride_do
    total = multiplied(left_ptrs, right_ptrs, k, n, stride_di, IN, OUT, PRECISION, WIDEN, BLOCK_M, BLOCK_N, BLOCK_K)
    weight = tl.load(weight_ptr + row + i, mask=inside, other=0.0).to(tl.float32)
    wide = 2 * OUT if GATED else OUT
    # The row's place is a scalar of 64 bits; what is relative to it fits 32, of which registers hold twice as many.
    hidden_ptr += row * wide
    slope_ptr += row * wide
    active_ptr += row * OUT
    # Half a tile at a time: a whole one does not fit the registers.
    left, right = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    n = column * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    dots = _through(left, weight, hidden_ptr, slope_ptr, active_ptr, i, n, inside, OUT, KIND, GATED, STEP, VALUE)
    n += BLOCK_N // 2
    dots += _through(right, weight, hidden_ptr, slope_ptr, active_ptr, i, n, inside, OUT, KIND, GATED, STEP, VALUE)
    # Every column of tiles has its own row of sums: added up later in one order, as atomic additions would not be.
    tl.store(dots_ptr + column.to(tl.int64) * rows + row + i, dots, mask=inside)


def hidden_slope(
    slope_TD: Tensor,
    hidden_RH: Tensor,
    token_R: Tensor,
    weight_R: Tensor,
    weights: ExpertWeights,
    offset_E: Tensor,
    tiled: Tiles,
    *,
    kind: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Through the second product and the activation, which is computed again.

    Returns:
        (R, H) the gradient of the up product; (R, F) the activation times weight_R; (N, R) fp32, parts that sum to
        the gradient of weight_R, its bias aside.
    """
    table, block_m = tiled
    rows, hidden = hidden_RH.shape[0], weights.hidden
    slope_RH, active_RF = torch.empty_like(hidden_RH), hidden_RH.new_empty(rows, hidden)
    block_n = 32 if INTERPRETED else min(max(triton.next_power_of_2(hidden), 16), 128)
    columns = triton.cdiv(hidden, block_n)
    dots_NR = torch.empty((columns, rows), dtype=torch.float32, device=hidden_RH.device)
    down_EDF = weights.down_EFD.transpose(1, 2)
    _hidden_kernel[(table.shape[1] * columns,)](
        slope_TD, token_R, weight_R, down_EDF, hidden_RH, slope_RH, active_RF, dots_NR,
        table[0], table[1], offset_E, table.shape[1], rows, slope_TD.stride(0), *down_EDF.stride(),
        IN=weights.width, OUT=hidden, KIND=kind, GATED=weights.gated,
        PRECISION=precision(hidden_RH.dtype), WIDEN=INTERPRETED, BLOCK_M=block_m, BLOCK_N=block_n, **layout(weights),
    )  # fmt: skip
    return slope_RH, active_RF, dots_NR


@triton.autotune(
    _STACK, key=["HIGH", "OUT", "BLOCK_M", "GATHER_LEFT", "GATHER_RIGHT", "stride_oo"], prune_configs_by=pruned()
)
@triton.jit
def _stack_kernel(
    left_ptr, right_ptr, token_ptr, offset_ptr, out_ptr, stride_l, stride_r, stride_oe, stride_om, stride_oo,
    HIGH: tl.constexpr, OUT: tl.constexpr, GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    high, columns = (HIGH + BLOCK_M - 1) // BLOCK_M, (OUT + BLOCK_N - 1) // BLOCK_N
    e = tl.program_id(0) // (high * columns)
    within = tl.program_id(0) % (high * columns)
    # Eight tiles down, then one across, so that programs that run together share operands in the L2 cache.
    first = within // (8 * columns) * 8
    size = tl.minimum(high - first, 8)
    m = (first + within % (8 * columns) % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = within % (8 * columns) // size * BLOCK_N + tl.arange(0, BLOCK_N)
    begin = tl.load(offset_ptr + e).to(tl.int32)
    end = tl.load(offset_ptr + e + 1).to(tl.int32)
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, dtype=tl.float32)
    for r in range(begin, end, BLOCK_K):
        row = r + tl.arange(0, BLOCK_K)
        inside = row < end
        left_row = row.to(tl.int64)
        right_row = left_row
        if GATHER_LEFT:
            left_row = tl.load(token_ptr + row, mask=inside, other=0)
        if GATHER_RIGHT:
            right_row = tl.load(token_ptr + row, mask=inside, other=0)
        a = tl.load(left_ptr + left_row[:, None] * stride_l + m, mask=inside[:, None] & (m < HIGH), other=0.0)
        b = tl.load(right_ptr + right_row[:, None] * stride_r + n, mask=inside[:, None] & (n < OUT), other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(tl.trans(a), b, total, input_precision=PRECISION)
    out_ptrs = out_ptr + e.to(tl.int64) * stride_oe + m[:, None] * stride_om + n[None, :] * stride_oo
    tl.store(out_ptrs, total, mask=(m < HIGH)[:, None] & (n < OUT)[None, :])


def stack_slope(
    left: Tensor, right: Tensor, like_EMO: Tensor, token_R: Tensor, offset_E: Tensor, *, gather: str
) -> Tensor:
    """(E, M, O), for each expert the sum over its entries r of left[r] outer right[r]; zero where it has none.

    Args:
        left: (R, M), or (T, M) when ``gather`` is "left"; contiguous in M.
        right: (R, O), or (T, O) when ``gather`` is "right"; contiguous in O.
        like_EMO: the weight; the gradient has its dtype and, where that is dense, its strides.
        token_R: the row of each entry, for the one that is gathered.
        offset_E: where each expert's entries begin.
        gather: "left" or "right".
    """
    out_EMO = torch.empty_like(like_EMO)
    experts, high, outer = out_EMO.shape
    block_m = 32 if INTERPRETED else min(max(triton.next_power_of_2(high), 16), 128)

    def grid(meta: dict) -> tuple[int]:
        return (experts * triton.cdiv(high, block_m) * triton.cdiv(outer, meta["BLOCK_N"]),)

    _stack_kernel[grid](
        left, right, token_R, offset_E, out_EMO, left.stride(0), right.stride(0), *out_EMO.stride(),
        HIGH=high, OUT=outer, GATHER_LEFT=gather == "left", GATHER_RIGHT=gather == "right",
        PRECISION=precision(left.dtype), WIDEN=INTERPRETED, BLOCK_M=block_m,
    )  # fmt: skip
    return out_EMO
