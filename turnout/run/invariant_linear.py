"""Batch-invariant affine maps: a row's bits do not depend on the rows beside it, on their number, or on its place.

By kernels whose rows do not know each other where those can be compiled, else in tiles of one size
(``turnout.solve.fixed_rows``). Neither is chosen by anything but the shape of the weights, the dtype and the machine.
"""

import torch
from torch import Tensor

from turnout.run.compiled.dots import dots, suits_dots
from turnout.run.compiled.panels import panel_products, suits_panels
from turnout.run.compiled.rows import MOST_ROWS, rows_times, suits_rows
from turnout.solve.fixed_rows import fixed_linear
from turnout.types import Packed

__all__ = ["HALVES", "invariant_linear", "invariant_packed_linear"]

# In these torch's products are slow where the processor has none of its own: a quarter of the speed of fp32.
HALVES = (torch.bfloat16, torch.float16)


def invariant_linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The affine map x W^T + b, a row's bits the same in any batch; no gradients.

    Args:
        x: (..., I).
        weight_OI: (O, I).
        bias_O: (O,) or None.

    >>> invariant_linear(torch.ones(2, 3), torch.ones(4, 3)).shape
    torch.Size([2, 4])

    Source: He, 2025, "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab).
    """
    x_MI, stack_1IO = x.reshape(-1, x.shape[-1]).contiguous(), weight_OI.t().unsqueeze(0)
    if not suits_dots(x_MI, stack_1IO):
        if x.dtype in HALVES and x_MI.shape[0] and suits_rows(x_MI[:1], weight_OI, bias_O):
            return _some_rows(x_MI, weight_OI, bias_O).view(*x.shape[:-1], -1)
        return fixed_linear(x_MI, weight_OI, bias_O).view(*x.shape[:-1], -1)
    out_MO = x_MI.new_empty(x_MI.shape[0], weight_OI.shape[0])
    dots(x_MI, stack_1IO, [0], [0, x_MI.shape[0]], out_MO)
    return (out_MO if bias_O is None else out_MO.add_(bias_O)).view(*x.shape[:-1], -1)


def _some_rows(x_MI: Tensor, weight: Tensor | Packed, bias_O: Tensor | None) -> Tensor:
    """(M, O) by the kernel of few rows, so many at a time: with it too each row is by itself."""
    return torch.cat([rows_times(some_NI, weight, bias_O) for some_NI in x_MI.split(MOST_ROWS)])


def invariant_packed_linear(x: Tensor, weight: Packed, bias_O: Tensor | None = None) -> Tensor:
    """``invariant_linear`` of a matrix in few bits.

    Args:
        x: (..., I).
        weight: (O, I).
        bias_O: (O,) or None.

    >>> weight = Packed.of(torch.tensor([[1, -2], [3, 0]]), torch.tensor([[1.0], [0.5]]), group=2, bits=4)
    >>> invariant_packed_linear(torch.tensor([[1.0, 1.0]]), weight)
    tensor([[-1.0000,  1.5000]])

    Source: as ``invariant_linear``.
    """
    x_MI = x.reshape(-1, x.shape[-1]).contiguous()
    shape = (*x.shape[:-1], weight.shape[0])
    if suits_panels(x_MI, weight):
        out_MO = x_MI.new_empty(x_MI.shape[0], weight.shape[0])
        panel_products(x_MI, weight, [0], [0, x_MI.shape[0]], out_MO)
        return (out_MO if bias_O is None else out_MO.add_(bias_O)).view(shape)
    if x_MI.shape[0] and suits_rows(x_MI[:1], weight, bias_O):
        return _some_rows(x_MI, weight, bias_O).view(shape)
    bias_O = None if bias_O is None else bias_O.to(x.dtype)
    return fixed_linear(x_MI, weight.dequantised(x.dtype), bias_O).view(shape)
