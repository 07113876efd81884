"""Sorting the keys of entries."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["in_order"]

# Keys from which on numpy sorts them in less time than torch.
_MANY = 256


def in_order(key_R: Tensor) -> tuple[Tensor, Tensor]:
    """The keys in order, and where each stood; equal ones stay in theirs."""
    plain = type(key_R) is Tensor and key_R.device.type == "cpu" and key_R.dtype != torch.int64
    if (
        not plain
        or key_R.numel() < _MANY
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()  # what counts torch's operations would miss it
    ):
        return key_R.sort(stable=True)
    # A sixth of the time of torch's: numpy counts such keys, torch compares them.
    entry_R = torch.from_numpy(np.argsort(key_R.numpy(), kind="stable"))
    return key_R.index_select(0, entry_R), entry_R
