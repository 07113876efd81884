"""Weights of four bits in blocks of 32 that share a scale (MXFP4), as gpt-oss is published: in and out."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.types import Packed

__all__ = [
    "BLOCK",
    "BLOCKS",
    "METHOD",
    "SCALES",
    "SETTINGS",
    "levels",
    "matrix_of",
    "shape_of",
    "stored",
    "unpack",
    "unpacked",
]

METHOD = "mxfp4"
BLOCK = 32

BLOCKS = "_blocks"
SCALES = "_scales"
# What the four bits mean: sign, two bits of exponent, one of mantissa.
_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The exponent of a block's scale is stored with this added.
_BIAS = 127
# ``quantization_config`` of config.json, where the model did not come with one; in the words of gpt-oss.
SETTINGS: dict[str, Any] = {
    "quant_method": METHOD,
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def unpacked(dtypes: Mapping[str, str]) -> list[str]:
    """The names of the weights that are stored as blocks and scales, of bytes."""
    found = [name.removesuffix(BLOCKS) for name in dtypes if name.endswith(BLOCKS)]
    return [name for name in found if dtypes[name + BLOCKS] == dtypes.get(name + SCALES) == "U8"]


def shape_of(blocks_shape: list[int], scales_shape: list[int]) -> list[int]:
    """(E, in, out) of blocks (E, out, in / 32, 16) and scales (E, out, in / 32); empty where they do not fit."""
    if len(blocks_shape) != 4 or blocks_shape[:3] != scales_shape or blocks_shape[3] * 2 != BLOCK:
        return []
    experts, outer, groups, _ = blocks_shape
    return [experts, groups * BLOCK, outer]


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """(in, out) in fp32, the weights of one expert; every one of them is a bfloat16 too.

    Args:
        blocks: (out, G, 16) bytes of two weights each, the low half first.
        scales: (out, G) bytes, the exponent of two of each block.

    >>> unpack(torch.tensor([[[0x21, 0x9F]]], dtype=torch.uint8), torch.tensor([[128]], dtype=torch.uint8)).tolist()
    [[1.0], [2.0], [-12.0], [-1.0]]

    Source: Rouhani et al., 2023, "Microscaling Data Formats for Deep Learning"; the layout of OpenAI, 2025,
    "gpt-oss-120b & gpt-oss-20b Model Card".
    """
    value_C = levels()
    pair_C2 = torch.stack((value_C.repeat(16), value_C.repeat_interleave(16)), dim=1)
    wide = torch.nn.functional.embedding(blocks.to(torch.int32), pair_C2).flatten(-2)
    size = torch.ldexp(torch.ones(scales.shape), scales.to(torch.int32) - _BIAS)
    return wide.mul_(size.unsqueeze(-1)).flatten(1).t()


def matrix_of(blocks: Tensor, scales: Tensor) -> Packed:
    """The stack (E, out, in) in four bits, to the bit: the same codes, and each scale as the bfloat16 that it is.

    Args:
        blocks: (E, out, G, 16) bytes, as for ``unpack``.
        scales: (E, out, G) bytes.

    >>> one = matrix_of(torch.full((1, 1, 1, 16), 0x9F, dtype=torch.uint8), torch.tensor([[[128]]], dtype=torch.uint8))
    >>> one, one.dequantised()[0, 0, :2].tolist()
    (Packed(1x1x32, bits=4, group=32, levels), [-12.0, -1.0])

    Source: as ``unpack``.
    """
    return Packed(blocks.flatten(-2).contiguous(), _wide(scales).contiguous(), BLOCK, 4, levels())


def stored(packed: Packed) -> dict[str, Tensor]:
    """What a folder holds of a stack, by the end of the name: the bytes that ``matrix_of`` was given.

    Args:
        packed: a stack whose levels are those of MXFP4 and whose scales are powers of two.

    Raises:
        UsageError: another data type, or a scale that is no power of two.

    >>> given = torch.arange(16, dtype=torch.uint8).view(1, 1, 1, 16), torch.tensor([[[0]]], dtype=torch.uint8)
    >>> [torch.equal(*pair) for pair in zip(stored(matrix_of(*given)).values(), given)]
    [True, True]

    Source: as ``unpack``.
    """
    exponents = (packed.scale.view(torch.int16) >> 7).to(torch.uint8) if packed.scale.dtype == torch.bfloat16 else None
    if exponents is None or not torch.equal(_wide(exponents), packed.scale):
        raise _refusal("the scales", "others", "be powers of two in bfloat16")
    if packed.levels is None or not torch.equal(packed.levels.cpu(), levels()) or packed.group != BLOCK:
        raise _refusal("the weights", repr(packed), f"be in groups of {BLOCK}, with levels {sorted(set(_VALUES))}")
    return {BLOCKS: packed.code.unflatten(-1, (-1, BLOCK // 2)), SCALES: exponents}


def levels() -> Tensor:
    """(16,) what the codes stand for, fp32."""
    return torch.tensor([sign * value for sign in (1, -1) for value in _VALUES])


def _wide(scales: Tensor) -> Tensor:
    """2^(s - 127) in bfloat16, which has all of them: the same exponent, but that of zero, which is half of one's.

    The largest, 255, becomes infinite: as ``ldexp`` has it, and transformers with it.
    """
    bits = scales.to(torch.int16) << 7
    return torch.where(scales == 0, 1 << 6, bits).to(torch.int16).view(torch.bfloat16)


def _refusal(what: str, got: str, allowed: str) -> UsageError:
    fix = "write the weights out with turnout.reshape.densify, or keep it in turnout's own format with checkpoint.save"
    return UsageError(word(what, got=got, allowed=f"{allowed} to be MXFP4", where="to_hf", fix=fix))
