"""Tables of where a model's numbers lie: what a compiled step reads instead of modules.

A kernel that took every weight as an argument would be compiled for each model and called at the price of each
argument. These records hold addresses and sizes: one kernel for all models, one call a step. Whoever fills a table
keeps the tensors alive while it is used (``Kept``).
"""

import importlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnout.run.compiled.engine import Lazy

__all__ = ["CODES", "LAYER", "MODEL", "NORM", "Kept", "brains", "floats", "wholes"]

# How numbers are stored, as a table says it.
FLOAT, BRAIN = 0, 1
CODES = {torch.float32: FLOAT, torch.bfloat16: BRAIN}

# A matrix, or a stack of them for experts: bytes where it begins and from one to the next, how its numbers are stored,
# and its order in memory: an output's weights after each other, or (by input) an input's, ``stride`` numbers apart.
# A bias is fp32, so many numbers from one to the next; 0 for none.
AT, NEXT, CODE, OUTS, INS, BY_INPUT, STRIDE, BIAS, BIAS_NEXT = range(9)
# A norm: fp32 weights and biases (0 for none); by mean and variance (layer), or by the root mean square.
NORM = np.dtype([("weight", "i8"), ("bias", "i8"), ("layer", "i8"), ("eps", "f4")], align=True)
_LAYER = {
    # of attention; -1 where there is no such norm
    "i8": "norm qkv out out_norm q_norm k_norm qk_full heads key_heads head_width rotated local window slots keys "
    "values cache_code sinks "
    # of the feed-forward layer: where routed, how
    "ff_norm ff_out_norm routed router sigmoid correction groups top_groups best_two renormalize top_k labels "
    "up down shared_up shared_down shared_gate",
    "f4": "scale softcap residual floor weight_scale",
}
LAYER = np.dtype(
    [(n, kind) for kind, names in _LAYER.items() for n in names.split()] + [("activation", "i8")], align=True
)
_MODEL = {
    "i8": "width vocab embedding embedding_code positions positions_code norm head frequencies local_frequencies pairs",
    "f4": "embedding_scale divisor softcap magnitude",
}
MODEL = np.dtype([(name, kind) for kind, names in _MODEL.items() for name in names.split()], align=True)


class Kept:
    """The tensors whose addresses stand in tables, and the addresses."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

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

    def matrix(self, stack: Tensor, bias: Tensor | None = None) -> tuple[int, ...]:
        """The row of a table of matrices for (O, I), or for a stack (E, O, I) of them."""
        size, strides = stack.element_size(), stack.stride()
        outs, ins = stack.shape[-2:]
        by_input = strides[-1] != 1 and strides[-2] == 1
        first = strides[0] if stack.ndim == 3 else 0
        return (
            self.at(stack), first * size, CODES[stack.dtype], outs, ins, int(by_input),
            strides[-1] if by_input else strides[-2], self.wide(bias), 0 if bias is None else bias.shape[-1],
        )  # fmt: skip


def _view(kind: str) -> Any:
    numba = importlib.import_module("numba")
    types = numba.types
    number = {"f": types.float32, "b": types.uint16, "w": types.int64}[kind]

    @importlib.import_module("numba.extending").intrinsic
    def pointer(context: Any, address: Any) -> Any:
        def lower(context: Any, builder: Any, signature: Any, given: Any) -> Any:
            return builder.inttoptr(given[0], context.get_value_type(types.CPointer(number)))

        return types.CPointer(number)(types.int64), lower

    carray = numba.carray

    @numba.njit
    def view(address: Any, count: Any) -> Any:
        return carray(pointer(address), count)

    return view


def _floats() -> Any:
    return _view("f")


def _brains() -> Any:
    return _view("b")


def _wholes() -> Any:
    return _view("w")


# floats(address, count): that many fp32 numbers from there; the others of bfloat16 and int64.
floats: Any = Lazy(_floats)
brains: Any = Lazy(_brains)
wholes: Any = Lazy(_wholes)
