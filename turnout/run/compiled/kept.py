"""Kept: what the addresses in a step's tables point to."""

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.formats import matrices
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
        row = (
            address(found.code.dtype, found.scale.dtype, by_input=by_input),
            *(each.ctypes.data for each in (found.code, found.scale, found.levels)),
            found.stride_expert, found.stride_out, outs, ins, found.groups, found.group,
            int(not by_input and split(found.code.dtype)),
            self.wide(bias), 0 if bias is None else bias.shape[-1],
        )  # fmt: skip
        assert len(row) == COLUMNS
        return row
