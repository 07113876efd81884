"""What every product stands on: the table of row tiles, one tile's product, the sum over each token's rows."""

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["Tiles", "column_sums", "combine", "fetched", "multiplied", "place", "row_dots", "tiles"]

Tiles = tuple[Tensor, int]
"""The table (2, N) int32 of experts (-1: nothing to do) and first rows, and the rows of a tile."""


@triton.jit
def _tiles_kernel(offset_ptr, expert_ptr, row_ptr, E, limit, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):
    """Program e lists the tiles of expert e; program E marks what is left of the table as nothing to do."""
    e = tl.program_id(0)
    i = tl.arange(0, BLOCK_E)
    begin_E = tl.load(offset_ptr + i, mask=i < E, other=0).to(tl.int32)
    end_E = tl.load(offset_ptr + i + 1, mask=i < E, other=0).to(tl.int32)
    count_E = (end_E - begin_E + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(i < e, count_E, 0))
    begin = tl.sum(tl.where(i == e, begin_E, 0))
    count = tl.where(e < E, tl.sum(tl.where(i == e, count_E, 0)), limit - first)
    for c in range(0, count, 64):
        j = c + tl.arange(0, 64)
        tl.store(expert_ptr + first + j, tl.where(e < E, e, -1) + 0 * j, mask=j < count)
        tl.store(row_ptr + first + j, begin + j * BLOCK_M, mask=j < count)


def tiles(offset_E: Tensor, rows: int, block_m: int) -> Tiles:
    """Cuts each expert's rows into tiles, on the device: the host knows only the most that there can be."""
    experts = offset_E.numel() - 1
    limit = (rows + min(experts, rows) * (block_m - 1)) // block_m
    # A multiple of 16 keeps the second row aligned and the count of one kind, so that Triton compiles once.
    limit = -(-limit // 16) * 16
    table = torch.empty((2, limit), dtype=torch.int32, device=offset_E.device)
    _tiles_kernel[(experts + 1,)](
        offset_E, table[0], table[1], experts, limit, BLOCK_M=block_m, BLOCK_E=triton.next_power_of_2(experts)
    )
    return table, block_m


@triton.jit
def place(tile_ptr, row_ptr, offset_ptr, count, columns, BLOCK_M: tl.constexpr, GROUP: tl.constexpr):
    """This program's tile: expert (-1: none), first row, which of its rows are the expert's, and column of tiles.

    Programs that run together share GROUP row tiles and all columns, so that both operands stay in the L2 cache.
    """
    program = tl.program_id(0)
    each = GROUP * columns
    first = program // each * GROUP
    size = min(count - first, GROUP)
    tile = first + program % each % size
    column = program % each // size
    e = tl.load(tile_ptr + tile)
    row = tl.load(row_ptr + tile).to(tl.int64)
    end = tl.load(offset_ptr + tl.maximum(e, 0) + 1)
    return e.to(tl.int64), row, tl.arange(0, BLOCK_M) < end - row, column


@triton.jit
def fetched(left_ptrs, right_ptrs, k, n, left, OUT: tl.constexpr, WHOLE: tl.constexpr, WIDEN: tl.constexpr):
    """A piece of each operand; where tiles do not divide the sizes (not WHOLE), zeros past the ``left`` that remain."""
    if WHOLE:
        a = tl.load(left_ptrs)
        b = tl.load(right_ptrs)
    else:
        a = tl.load(left_ptrs, mask=(k < left)[None, :], other=0.0)
        b = tl.load(right_ptrs, mask=(k < left)[:, None] & (n < OUT)[None, :], other=0.0)
    if WIDEN:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return a, b


@triton.jit
def multiplied(
    left_ptrs, right_ptrs, k, n, stride_i, IN: tl.constexpr, OUT: tl.constexpr, PRECISION: tl.constexpr,
    WIDEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile's rows times its columns of one matrix, in fp32."""
    total = tl.full((BLOCK_M, BLOCK_N), 0.0, dtype=tl.float32)
    for k0 in range(0, IN, BLOCK_K):
        a, b = fetched(left_ptrs, right_ptrs, k, n, IN - k0, OUT, IN % BLOCK_K == 0 and OUT % BLOCK_N == 0, WIDEN)
        total = tl.dot(a, b, total, input_precision=PRECISION)
        left_ptrs += BLOCK_K
        right_ptrs += BLOCK_K * stride_i
    return total


@triton.jit
def _combine_kernel(rows_ptr, order_ptr, start_ptr, out_ptr, D, TOP_K: tl.constexpr, BLOCK_D: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    total = tl.full((BLOCK_D,), 0.0, dtype=tl.float32)
    if TOP_K > 0:
        for k in tl.static_range(TOP_K):
            row = tl.load(order_ptr + t * TOP_K + k)
            total += tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    else:
        for j in range(tl.load(start_ptr + t), tl.load(start_ptr + t + 1)):
            row = tl.load(order_ptr + j)
            total += tl.load(rows_ptr + row * D + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + t * D + d, total, mask=d < D)


def combine(rows_RD: Tensor, order_R: Tensor, start_T: Tensor, top_k: int) -> Tensor:
    """(T, D), the sum of each token's rows in fp32; one order on every run, which atomic additions would not give.

    Args:
        rows_RD: (R, D), contiguous.
        order_R: positions of the rows, token by token.
        start_T: (T + 1,), where each token's begin.
        top_k: rows of every token when they are equally many, else 0.
    """
    tokens, width = start_T.numel() - 1, rows_RD.shape[1]
    out_TD = torch.empty((tokens, width), dtype=rows_RD.dtype, device=rows_RD.device)
    block = min(triton.next_power_of_2(width), 1024)
    _combine_kernel[(tokens, triton.cdiv(width, block))](
        rows_RD, order_R, start_T, out_TD, width, TOP_K=top_k, BLOCK_D=block, num_warps=4 if block >= 512 else 1
    )
    return out_TD


@triton.jit
def _column_sums_kernel(
    rows_ptr, token_ptr, weight_ptr, offset_ptr, out_ptr, stride_r, OUT,
    GATHER: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    e = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(offset_ptr + e + 1)
    total = tl.full((BLOCK_R, BLOCK_N), 0.0, dtype=tl.float32)
    for r in range(tl.load(offset_ptr + e), end, BLOCK_R):
        row = r + tl.arange(0, BLOCK_R)
        inside = row < end
        source = tl.load(token_ptr + row, mask=inside, other=0) if GATHER else row
        part = tl.load(rows_ptr + source[:, None] * stride_r + n, mask=inside[:, None] & (n < OUT), other=0.0)
        if GATHER:
            total += part.to(tl.float32) * tl.load(weight_ptr + row, mask=inside, other=0.0).to(tl.float32)[:, None]
        else:
            total += part.to(tl.float32)
    tl.store(out_ptr + e.to(tl.int64) * OUT + n, tl.sum(total, 0), mask=n < OUT)


def column_sums(
    rows: Tensor, offset_E: Tensor, dtype: torch.dtype, *, token_R: Tensor | None = None, weight_R: Tensor | None = None
) -> Tensor:
    """(E, O), the sum of each expert's rows: a bias's gradient. With token_R: of rows[token_R] times weight_R."""
    experts, outer = offset_E.numel() - 1, rows.shape[1]
    out_EO = torch.empty((experts, outer), dtype=dtype, device=rows.device)
    unused = offset_E
    _column_sums_kernel[(experts, triton.cdiv(outer, 64))](
        rows, unused if token_R is None else token_R, unused if weight_R is None else weight_R, offset_E, out_EO,
        rows.stride(0), outer, GATHER=token_R is not None, BLOCK_R=32, BLOCK_N=64,
    )  # fmt: skip
    return out_EO


@triton.jit
def _row_dots_kernel(
    x_ptr, token_ptr, bias_ptr, out_ptr, tile_ptr, row_ptr, offset_ptr, count, stride_xt, stride_be, stride_bd, D,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    e, row, inside, _ = place(tile_ptr, row_ptr, offset_ptr, count, 1, BLOCK_M, 1)
    i = tl.arange(0, BLOCK_M)
    if e >= 0:
        token = tl.load(token_ptr + row + i, mask=inside, other=0)
        total = tl.full((BLOCK_M,), 0.0, dtype=tl.float32)
        for k0 in range(0, D, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            x = tl.load(x_ptr + token[:, None] * stride_xt + k, mask=inside[:, None] & (k < D), other=0.0)
            bias = tl.load(bias_ptr + e * stride_be + k * stride_bd, mask=k < D, other=0.0)
            total += tl.sum(x.to(tl.float32) * bias.to(tl.float32)[None, :], 1)
        tl.store(out_ptr + row + i, total, mask=inside)


def row_dots(x_TD: Tensor, token_R: Tensor, bias_ED: Tensor, offset_E: Tensor, tiled: Tiles, out_R: Tensor) -> None:
    """Writes x[token_R[r]] . bias[expert of r] to out_R."""
    table, block_m = tiled
    _row_dots_kernel[(table.shape[1],)](
        x_TD, token_R, bias_ED, out_R, table[0], table[1], offset_E, table.shape[1],
        x_TD.stride(0), bias_ED.stride(0), bias_ED.stride(1), x_TD.shape[1], BLOCK_M=block_m, BLOCK_K=64,
    )  # fmt: skip
