"""Kept: what the addresses in a step's tables point to."""

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.formats import Matrices, matrices
from turnout.run.compiled.tables import COLUMNS
from turnout.run.compiled.times import address, split
from turnout.types.packed import Packed

__all__ = ["Kept"]


class Kept:
    """The tensors whose addresses stand in tables, and the addresses."""

    def __init__(self) -> None:
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
        by_place = int(not by_input and split(found.code.dtype))
        row = *self._begin(found, by_input=by_input), *between, outs, ins, *few, by_place, *added
        assert len(row) == COLUMNS
        return row

    def parted(self, weight: Tensor | Packed, heads: int, first: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The rows for two stacks that one matrix (H O, I) holds: of each of H heads the first O rows, and the rest.

        The first is one of (I, O) matrices, by input: what the others make of I numbers meets O numbers there.
        """
        found, (outs, ins) = matrices(weight), weight.shape
        self.tensors += [found.code, found.scale, found.levels]
        each = outs // heads
        stride, groups = found.stride_out, found.groups
        between = each * stride, stride, each * groups
        kernel, code, scale, levels = self._begin(found, by_input=False)
        code, scale = code + first * stride * found.code.itemsize, scale + first * groups * found.scale.itemsize
        few = groups, found.group
        start = self._begin(found, by_input=True)
        return (
            (*start, *between, ins, first, *few, 0, 0, 0),
            (kernel, code, scale, levels, *between, each - first, ins, *few, int(split(found.code.dtype)), 0, 0),
        )

    @staticmethod
    def _begin(found: Matrices, *, by_input: bool) -> tuple[int, int, int, int]:
        """Its kernel, and where codes, scales and levels are."""
        code, scale, levels = (each.ctypes.data for each in (found.code, found.scale, found.levels))
        return address(found.code.dtype, found.scale.dtype, by_input=by_input), code, scale, levels
