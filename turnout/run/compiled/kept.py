"""Kept: what the addresses in a step's tables point to."""

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.formats import Matrices, matrices, meets_short
from turnout.run.compiled.tables import COLUMNS, KERNEL, NEXT, SCALE_NEXT, STRIDE
from turnout.run.compiled.times import address, order_of
from turnout.types.packed import Packed

__all__ = ["Kept"]


class Kept:
    """The tensors whose addresses stand in tables, and the addresses.

    Args:
        dtype: of activations, where weights in few bits do not say it: bfloat16 for rows that are rounded to it.
    """

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        self._dtype = dtype
        self.tensors: list[Tensor | np.ndarray] = []

    def at(self, tensor: Tensor | None) -> int:
        """Where its numbers begin; 0 for None."""
        if tensor is None:
            return 0
        self.tensors.append(tensor.detach())
        return tensor.data_ptr()

    def wide(self, vector: Tensor | None, plus: float = 0.0) -> int:
        """Where its numbers, in fp32 and contiguous, begin; 0 for None."""
        if vector is None:
            return 0
        wide = vector.detach().to(torch.float32).contiguous()
        return self.at(wide + plus if plus else wide)

    def matrix(
        self, stack: Tensor | Packed, bias: Tensor | None = None, *, by_input: bool | None = None
    ) -> tuple[int, ...]:
        """The row of a table of matrices for (O, I), or for a stack (E, O, I) of them.

        Where both orders are true of it, as with one output, ``by_input`` says which it is; each output's weights after
        each other when None.
        """
        if by_input is None:
            by_input = isinstance(stack, Tensor) and stack.stride(-1) != 1 and stack.stride(-2) == 1
        # Told of a matrix by inputs is the transposed one, which lies by outputs.
        found = matrices(stack.transpose(-1, -2) if by_input and isinstance(stack, Tensor) else stack)
        self.tensors += [found.code, found.scale, found.levels]
        outs, ins = stack.shape[-2:]
        between, few = (found.stride_expert, found.stride_out, outs * found.groups), (found.groups, found.group)
        added = self.wide(bias), 0 if bias is None else bias.shape[-1]
        short = not by_input and self._meets_short(stack)
        order = 0 if by_input else order_of(found.code.dtype, short=short)
        row = *self._begin(found, by_input=by_input, short=short), *between, outs, ins, *few, order, *added
        assert len(row) == COLUMNS
        return row

    def slots(self, keys_GTW: Tensor, values_GTV: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows for keys and values that heads hold in T slots each: every slot begins a matrix.

        Of keys slots are outputs, of values inputs, and what comes out of values is added to what is there.
        """
        rows = []
        for stack, by_input in ((keys_GTW, False), (values_GTV.transpose(1, 2), True)):
            row = list(self.matrix(stack, by_input=by_input))
            row[NEXT], row[SCALE_NEXT] = row[STRIDE], 0
            rows.append(row)
        plain = matrices(values_GTV)
        rows[1][KERNEL] = address(plain.code.dtype, plain.scale.dtype, by_input=True, onto=True)
        return tuple(rows[0]), tuple(rows[1])

    def parted(self, weight: Tensor | Packed, heads: int, first: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows for two stacks that one matrix (H O, I) holds: of each of H heads the first O rows, and the rest.

        The first is one of (I, O) matrices, by input: what the others make of I numbers meets O numbers there.
        """
        found, (outs, ins) = matrices(weight), weight.shape
        self.tensors += [found.code, found.scale, found.levels]
        each = outs // heads
        stride, groups = found.stride_out, found.groups
        between = each * stride, stride, each * groups
        short = self._meets_short(weight)
        kernel, code, scale, levels = self._begin(found, by_input=False, short=short)
        code, scale = code + first * stride * found.code.itemsize, scale + first * groups * found.scale.itemsize
        few = groups, found.group
        start = self._begin(found, by_input=True)
        return (
            (*start, *between, ins, first, *few, 0, 0, 0),
            (
                kernel,
                code,
                scale,
                levels,
                *between,
                each - first,
                ins,
                *few,
                order_of(found.code.dtype, short=short),
                0,
                0,
            ),
        )

    def _meets_short(self, weight: Tensor | Packed) -> bool:
        return meets_short(weight, weight.dtype if isinstance(weight, Tensor) else self._dtype)

    @staticmethod
    def _begin(found: Matrices, *, by_input: bool, short: bool = False) -> tuple[int, int, int, int]:
        """Its kernel, and where codes, scales and levels are."""
        code, scale, levels = (each.ctypes.data for each in (found.code, found.scale, found.levels))
        return address(found.code.dtype, found.scale.dtype, by_input=by_input, short=short), code, scale, levels
