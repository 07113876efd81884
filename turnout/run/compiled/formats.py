"""How matrices lie in memory, as kernels are told it: whatever the format, one description."""

import dataclasses
import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.engine import array, takes
from turnout.run.compiled.lanes import BLOCK, ROOM, features
from turnout.run.compiled.short_tile import NEEDS
from turnout.types.packed import Packed

__all__ = ["FLOATS", "Matrices", "blocks", "knows", "matrices", "meets_short"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_NONE = np.zeros(0, np.float32)
_MOST = 1 << 20  # inputs whose groups are still counted right in fp32
_WHOLE = np.arange(-8, 8, dtype=np.float32)  # what the codes of four bits stand for where nothing else is said


@dataclasses.dataclass(frozen=True, eq=False)
class Matrices:
    """One matrix (O, I) or a stack of them (E, O, I).

    Args:
        code: all their numbers or codes, flat.
        stride_expert: how far two matrices lie apart in ``code``.
        stride_out: how far two rows of one do.
        scale: all scales, flat, dense; empty where there are none.
        groups: how many scales a row has; 1 where there are none.
        group: the inputs that share a scale; I where there are none.
        levels: what codes of four bits stand for.
    """

    code: np.ndarray
    stride_expert: int
    stride_out: int
    scale: np.ndarray
    groups: int
    group: int
    levels: np.ndarray

    @property
    def told(self) -> tuple[Any, ...]:
        """As kernels take it."""
        return self.code, self.scale, self.levels, self.stride_expert, self.stride_out, self.groups, self.group


def blocks(ins: int) -> int:
    """The room for a row of so many numbers, in fp32.

    >>> blocks(33)
    64

    Source: none; plain bookkeeping.
    """
    return -(-ins // ROOM) * ROOM


def knows(weight: Tensor | Packed, dtype: torch.dtype) -> bool:
    """Whether kernels can read these weights for rows of this dtype: each output's lie one after the other.

    >>> knows(torch.ones(2, 3), torch.float32), knows(torch.ones(3, 2).t(), torch.float32)
    (True, False)

    Source: none; plain bookkeeping.
    """
    if isinstance(weight, Packed):
        fits = weight.group % BLOCK == 0 or weight.group == weight.shape[-1]
        return dtype in FLOATS and fits and takes(weight.code, weight.scale, weight.levels)
    return (
        weight.dtype == dtype and dtype in FLOATS and takes(weight) and (weight.stride(-1) == 1 or weight.shape[-1] < 2)
    )


def meets_short(weight: Tensor | Packed, dtype: torch.dtype) -> bool:
    """Whether rows of this dtype meet these weights, which ``knows`` knows, in bfloat16: so that no number is widened.

    Where activations are bfloat16, as transformers rounds them for every map, weights are, or what their codes stand
    for is exactly a bfloat16: whole numbers and MXFP4's, but not NF4's. All sums are in fp32.

    >>> meets_short(torch.ones(2, 3), torch.float32)
    False

    Source: none; plain bookkeeping.
    """
    if dtype != torch.bfloat16 or weight.shape[-1] > _MOST:
        return False
    if not isinstance(weight, Packed):
        return weight.dtype == dtype and _able(dtype)
    levels = _WHOLE if weight.levels is None else array(weight.levels)
    return _able(weight.code.dtype) and (levels is _WHOLE or not (levels.view(np.uint32) & 0xFFFF).any())


@functools.cache
def _able(code: torch.dtype) -> bool:
    return features() >= NEEDS[code]


def matrices(weight: Tensor | Packed) -> Matrices:
    """The description of weights (O, I) or (E, O, I) that ``knows``; a view, nothing is copied.

    >>> matrices(torch.ones(2, 3, 4)).stride_expert
    12

    Source: none; plain bookkeeping.
    """
    if isinstance(weight, Packed):
        stride = weight.code.shape[-1]
        levels = _WHOLE if weight.levels is None else array(weight.levels)
        code, scale = array(weight.code).reshape(-1), array(weight.scale).reshape(-1)
        return Matrices(
            code, weight.shape[-2] * stride, stride, scale, weight.shape[-1] // weight.group, weight.group, levels
        )
    flat = weight if weight.is_contiguous() else weight.as_strided((_reach(weight),), (1,))
    expert = weight.stride(0) if weight.ndim == 3 else 0
    return Matrices(array(flat).reshape(-1), expert, weight.stride(-2), _NONE, 1, weight.shape[-1], _WHOLE)


def _reach(weight: Tensor) -> int:
    """How many numbers of memory a view reaches over, from its first to its last."""
    if weight.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(weight.shape, weight.stride(), strict=True))
