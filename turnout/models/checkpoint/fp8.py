"""Weights of eight bits in blocks that share a scale (FP8), as DeepSeek-V3 is published: read, never written."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor

from turnout.reading import check_fields

__all__ = ["ACTIVATION", "SCALES", "block_of", "blocks", "unpack", "unpacked"]

SCALES = "_scale_inv"
# Of inputs, for kernels that round those to eight bits as well: no part of what the weights are.
ACTIVATION = "activation_scale"
_BIAS = 127
_WEIGHT, _SCALE = "F8_E4M3", ("F32", "BF16", "F16", "F8_E8M0", "U8")


def block_of(settings: Mapping[str, Any], refuse: Callable[[str], Exception]) -> tuple[int, int] | None:
    """The rows and columns of a block, as ``quantization_config`` says; None for one scale a tensor.

    Args:
        settings: the object in config.json.
        refuse: words what is wrong with it.
    """

    def no(problem: str) -> NoReturn:
        raise refuse(problem)

    kinds: dict[str, Any] = {"fmt": Literal["e4m3", "e4m3fn"] | None, "expert_dtype": Literal["fp8"] | None}
    kinds |= {"scale_fmt": Literal["float", "ue8m0"] | None, "activation_scheme": Literal["dynamic", "static"] | None}
    check_fields(settings, kinds | {"weight_block_size": list[int] | None}, no)
    block = settings.get("weight_block_size", [128, 128])  # what transformers takes where it is left out
    if block is not None and (len(block) != 2 or min(block) < 1):
        no(f"'weight_block_size' is {block}, which must be two sizes")
    return None if block is None else (block[0], block[1])


def unpacked(dtypes: Mapping[str, str]) -> list[str]:
    """The names of the weights that are stored in eight bits, with scales beside them."""
    return [name for name in dtypes if dtypes[name] == _WEIGHT and dtypes.get(name + SCALES) in _SCALE]


def blocks(shape: Sequence[int], scales: Sequence[int], block: tuple[int, int] | None) -> tuple[int, int] | None:
    """The rows and columns that share a scale of a weight (..., rows, columns); None where the scales do not fit.

    Args:
        shape: of the weight.
        scales: their shape; a single one may have any.
        block: what config.json says. At the edges of a weight blocks are cut off.

    >>> blocks([576, 7168], [5, 56], (128, 128)), blocks([576, 7168], [4, 56], (128, 128)), blocks([3, 8], [], None)
    ((128, 128), None, (3, 8))
    """
    *before, rows, columns = (1, *shape) if len(shape) == 1 else shape
    if block is None:
        return (rows, columns) if list(scales) in ([], [1], [*before, 1, 1]) else None
    wanted = [*before, -(-rows // block[0]), -(-columns // block[1])]
    return block if list(scales) == wanted and len(shape) > 1 else None


def unpack(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """(rows, columns) in fp32, each number the product, rounded once, of what is stored and its block's scale.

    Args:
        weight: (rows, columns) in float8_e4m3fn.
        scales: one for each block; bytes are exponents of two, with 127 added.
        block: rows and columns of a block.

    >>> unpack(torch.ones(3, 2).to(torch.float8_e4m3fn), torch.tensor([[0.5], [4.0]]), (2, 2)).tolist()
    [[0.5, 0.5], [0.5, 0.5], [4.0, 4.0]]

    Source: DeepSeek-AI, 2024, "DeepSeek-V3 Technical Report", section 3.3.2; the layout of its checkpoints.
    """
    wide = weight.to(torch.float32)
    if scales.dtype == torch.uint8:
        size = torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - _BIAS)
    else:
        size = scales.to(torch.float32)
    size = size.reshape(-(-wide.shape[0] // block[0]), -(-wide.shape[1] // block[1]))
    for number, rows in enumerate(wide.split(block[0])):
        rows.mul_(size[number].repeat_interleave(block[1])[: wide.shape[1]])
    return wide
