"""Memory for large intermediate results, without the page faults of fresh memory."""

import itertools
import math
import sys
import threading

import numpy as np
import torch
from torch import Tensor

__all__ = ["room", "room_like"]

# numpy asks the kernel for huge pages from this size on, on Linux. Fresh 4 KiB pages cost more to fault in than the
# products cost to fill them when experts are many: 77 ms against 12 ms for 200 MB on an EPYC 9005 virtual machine, and
# 7 ms where the memory was in use before. So blocks whose tensors are all gone are used again.
_LARGE_BYTES = 1 << 22
_ALIGN = 64
# A block that has lain idle for this many requests goes back to the system.
_PATIENCE = 64

_lock = threading.Lock()
_blocks: dict[int, tuple[np.ndarray, int]] = {}  # by address: the block, and the request that used it last
_requests = itertools.count()


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
    with _lock:
        block = _block(size + _ALIGN)
        offset = -block.ctypes.data % _ALIGN
        return torch.frombuffer(block, dtype=dtype, count=count, offset=offset).view(shape)


def _block(size: int) -> np.ndarray:
    """An idle block of about this size, or a new one. A tensor holds a reference to the block it lies in."""
    request, found = next(_requests), None
    for address in list(_blocks):
        block, used = _blocks[address]
        if sys.getrefcount(block) > _IDLE:
            continue
        if found is None and size <= block.nbytes <= size + size // 8:
            found = address
        elif request - used > _PATIENCE:
            del _blocks[address]
    if found is not None:
        _blocks[found] = (_blocks[found][0], request)
        return _blocks[found][0]
    block = np.empty(size, np.uint8)
    _blocks[block.ctypes.data] = (block, request)
    return block


# References to a block that no tensor uses, as _block counts them: the table's, its own and getrefcount's.
_IDLE = 3


def room_like(stack: Tensor) -> Tensor:
    """Room for a gradient: the shape and dtype of (E, I, O) weights, in their layout, so that nobody copies it over."""
    E, inside, outside = stack.shape
    if stack.stride(1) == 1 and stack.stride(2) != 1:
        return room((E, outside, inside), stack.dtype, stack.device).transpose(1, 2)
    return room((E, inside, outside), stack.dtype, stack.device)
