"""Memory for large intermediate results, without the page faults of fresh memory."""

import math

import numpy as np
import torch
from torch import Tensor

from turnout.run.pool import Pool

__all__ = ["room", "room_like"]

# numpy asks the kernel for huge pages from this size on, on Linux. Fresh 4 KiB pages cost more to fault in than the
# products cost to fill them when experts are many: 77 ms against 12 ms for 200 MB on an EPYC 9005 virtual machine, and
# 7 ms where the memory was in use before. So blocks whose tensors are all gone are used again.
_LARGE_BYTES = 1 << 22
_ALIGN = 64
# A block that has lain idle for this many requests goes back to the system.
_PATIENCE = 64


def _block(size: int) -> np.ndarray:
    """New memory, on the boundary that vector instructions like."""
    raw = np.empty(size + _ALIGN, np.uint8)
    start = -raw.ctypes.data % _ALIGN
    return raw[start : start + size]


_pool = Pool(_block, patience=_PATIENCE)


def room(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised contiguous tensor; on the CPU a large one lies in huge pages where the system has them.

    >>> room((2, 3), torch.float32, torch.device("cpu")).shape
    torch.Size([2, 3])

    Source: none; numpy's allocator calls madvise(MADV_HUGEPAGE), torch's does so only for a whole process.
    """
    count = math.prod(shape)
    size = count * dtype.itemsize
    if device.type != "cpu" or size < _LARGE_BYTES:
        return torch.empty(shape, dtype=dtype, device=device)
    # The storage holds the loan, so the block is lent for as long as anything lies in it.
    return torch.frombuffer(_pool.lend(size), dtype=dtype, count=count).view(shape)


def room_like(stack: Tensor) -> Tensor:
    """Room for a gradient: the shape and dtype of (E, I, O) weights, in their layout, so that nobody copies it over."""
    E, inside, outside = stack.shape
    if stack.stride(1) == 1 and stack.stride(2) != 1:
        return room((E, outside, inside), stack.dtype, stack.device).transpose(1, 2)
    return room((E, inside, outside), stack.dtype, stack.device)
