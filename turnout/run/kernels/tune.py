"""Which tile sizes, warps and pipeline depths the kernels may take."""

from collections.abc import Callable
from typing import Any

import torch
import triton

__all__ = ["INTERPRETED", "configs", "precision", "pruned", "tile_rows"]

# Triton reads this when it decorates a kernel; a later change has no effect. The interpreter keeps bf16 as integers and
# would multiply those, so there the kernels widen what they multiply (WIDEN).
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

# What one block may use of a Hopper multiprocessor's shared memory.
_SHARED_BYTES = 227 * 1024


def tile_rows(rows: int, experts: int) -> int:
    """Rows of a tile: the mean load rounded up to a power of two, between 16 (the least of a matrix unit) and 128.

    A rule and not a measurement, because one table of tiles serves every kernel of a layer.

    >>> [tile_rows(rows, 64) for rows in (1, 64 * 20, 32768 * 8)]
    [16, 32, 128]
    """
    return min(max(triton.next_power_of_2(-(-rows // experts)), 16), 128)


def precision(dtype: torch.dtype) -> str:
    """How a product takes fp32 operands: exactly, unless the user has allowed torch TF32. No effect on 16 bits."""
    return "ieee" if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def configs(*shapes: tuple[int | None, int, int, int]) -> list[triton.Config]:
    """Candidates from (BLOCK_N or None: the caller's, BLOCK_K, num_warps, num_stages); the interpreter takes one."""
    if INTERPRETED:
        shapes = ((shapes[0][0] and 32, 16, 4, 2),)
    return [
        triton.Config({"BLOCK_K": k} | ({"BLOCK_N": n} if n else {}), num_warps=warps, num_stages=stages)
        for n, k, warps, stages in shapes
    ]


def pruned(*, products: int = 1) -> dict[str, Callable[..., list[triton.Config]]]:
    """For ``triton.autotune``: keeps the candidates that fit shape, shared memory and registers, at least one.

    Args:
        products: accumulators of a program when the activation is gated.
    """

    def prune(candidates: list[triton.Config], named: dict[str, Any], **rest: Any) -> list[triton.Config]:
        given: dict[str, Any] = {**named, **rest}
        block_m, size = given["BLOCK_M"], given["left_ptr"].element_size()
        parts = products if given.get("GATED") else 1

        def shape(config: triton.Config) -> tuple[int, int]:
            return config.kwargs.get("BLOCK_N") or given["BLOCK_N"], config.kwargs["BLOCK_K"]

        def fits(config: triton.Config) -> bool:
            n, k = shape(config)
            # "IN" is the depth of the product where it is fixed; where it is a number of rows it has another name.
            too_wide = n > max(triton.next_power_of_2(given["OUT"]), 16)
            too_deep = "IN" in given and k > max(triton.next_power_of_2(given["IN"]), 16)
            shared = config.num_stages * k * (block_m + parts * n) * size
            registers = block_m * n * parts // (32 * config.num_warps)
            idle = config.num_warps > 4 and block_m < 64
            return shared <= _SHARED_BYTES and registers <= 128 and not (too_wide or too_deep or idle)

        kept = [config for config in candidates if fits(config)]
        return kept or [min(candidates, key=lambda config: shape(config)[0] * shape(config)[1])]

    return {"early_config_prune": prune}
