"""Weights in few bits as GGUF has them: the very codes, where a type of llama.cpp has the numbers that they mean."""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.models.attention import LatentAttention
from turnout.models.checkpoint import mxfp4
from turnout.models.checkpoint.few_bits import code_models
from turnout.models.config import LMConfig
from turnout.models.gguf.architectures import Architecture
from turnout.models.gguf.tensors import Piece, pieces, silence
from turnout.models.lm import LM, Block
from turnout.types import Packed

__all__ = ["Blocks", "check_kind", "packed_pieces"]

# Neighbours that share a scale in every one of these types.
_BLOCK = 32
_HALF_MOST = 65504.0
# Type -> the data types that it holds exactly, by bits and codes. Levels of MXFP4 are halves of whole numbers.
_HOLDS = {
    "q8_0": ((8, "int"), (4, "int"), (4, mxfp4.METHOD)),
    "q4_0": ((4, "int"),),
    mxfp4.METHOD: ((4, mxfp4.METHOD),),
}
_WHERE = "turnout.models.gguf.to_gguf"


def check_kind(config: LMConfig, kind: str) -> None:
    """Refuses a type that would round weights in few bits a second time.

    Args:
        config: of a model with maps in few bits.
        kind: the type asked for.

    Raises:
        UsageError: it has not the numbers that the codes mean.
    """
    few = config.quantized
    assert few is not None
    right = [name for name, held in _HOLDS.items() if (few.bits, few.codes) in held]
    grouped = few.group is None or few.group % _BLOCK == 0
    if kind in right and grouped:
        return
    rows = "rows" if few.group is None else f"groups of {few.group}"
    got = f"{kind} for weights in few bits, {few.bits} ({few.codes}) in {rows}, which would be rounded a second time"
    allowed = "hold the numbers that codes mean"
    fix = f"pass {' or '.join(right)}, or write" if right and grouped else "write"
    fix += " the weights out first (turnout convert --densify --gguf; turnout.reshape.densify), to round them again"
    raise UsageError(word("kind", got=got, allowed=allowed, where=_WHERE, fix=fix))


def packed_pieces(lm: LM, config: LMConfig, its: Architecture) -> Iterator[Piece]:
    """All tensors of a model with maps in few bits; those keep their codes, save what llama.cpp has turned.

    Args:
        lm: the model.
        config: as llama.cpp has it, all whole, perhaps with parts that add nothing.
        its: the architecture.
    """
    codes, scales, owners = code_models(lm, config)
    level_N = next((owner.levels for owner in owners.values() if owner.levels is not None), None)
    bits = next(owner.bits for owner in owners.values())
    for name, parameter in list(codes.named_parameters()):
        if parameter.is_meta:
            _put(codes, name, torch.full(parameter.shape, silence(name)))
    turned = _write_out_turned(lm, codes)
    for one, beside in zip(pieces(codes, its), pieces(scales, its), strict=True):
        coded = one.dtype in (torch.int8, torch.uint8)
        if not coded:
            yield dataclasses.replace(one, exact=one.exact or one.name.split(".")[-2] in turned)
            continue
        shape = (*one.shape[:-1], one.shape[-1] * (8 // bits))

        def packed(one: Piece = one, beside: Piece = beside, inner: int = shape[-1]) -> Packed:
            code, scale = one.make().contiguous(), beside.make().contiguous()
            return Packed(code, scale, inner // scale.shape[-1], bits, level_N)

        yield dataclasses.replace(one, shape=shape, packed=packed)


def _write_out_turned(lm: LM, codes: LM) -> tuple[str, ...]:
    """Writes out the maps whose inputs are outputs in llama.cpp: no scale is theirs there. Their names in the file."""
    found = False
    for block, coded in zip(lm.blocks, codes.blocks, strict=True):
        assert isinstance(block, Block) and isinstance(coded, Block)
        if isinstance(block.attention, LatentAttention) and "attention" in _parts(lm):
            weight: Any = block.attention.kv_up.weight
            _put(codes, f"{_name(codes, coded)}.attention.kv_up.weight", weight.packed.dequantised())
            found = True
    return ("attn_k_b", "attn_v_b") if found else ()


def _parts(lm: LM) -> tuple[str, ...]:
    return () if lm.config.quantized is None else tuple(lm.config.quantized.parts)


def _name(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, one in model.named_modules() if one is module)


def _put(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, slot = name.rpartition(".")
    setattr(model.get_submodule(owner), slot, nn.Parameter(tensor, requires_grad=False))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The bytes of a matrix or stack in blocks of 32, and how far its scales moved.

    Args:
        data: (..., O, bytes of a row) uint8.
        moved: the most that a scale changed by where it is stored as fp16, relative; 0 where none did.

    >>> packed = Packed.of(torch.arange(32).view(1, 32) - 16, torch.ones(1, 1), group=32, bits=8)
    >>> Blocks.of(packed, "q8_0", "x").data[0, :4].tolist()  # one in fp16, -16, -15
    [0, 60, 240, 241]

    Source: Gerganov et al., the file format of ggml; MXFP4 is that of Rouhani et al., 2023.
    """

    data: np.ndarray
    moved: float = 0.0

    @classmethod
    def of(cls, packed: Packed, kind: str, name: str) -> "Blocks":
        """The blocks of a type that ``check_kind`` allows.

        Args:
            packed: the weights.
            kind: "q8_0", "q4_0" or "mxfp4".
            name: of the tensor, for errors.

        Raises:
            UsageError: a scale that fp16 cannot hold.
        """
        if kind == mxfp4.METHOD:
            exponent = mxfp4.stored(packed)[mxfp4.SCALES].unsqueeze(-1)
            return cls(_bytes(exponent, _nibbles(packed)))
        scale, value = packed.scale.float(), packed.values()
        if packed.levels is not None:  # halves of whole numbers
            scale, value = scale / 2, (2 * packed.levels)[value.long()].to(torch.int8)
        scale = scale.repeat_interleave(packed.group // _BLOCK, -1)
        half = scale.to(torch.float16)
        if not bool(torch.isfinite(half).all()):
            got, fix = f"a scale of {float(scale.abs().max()):g}", "write the weights out first, and those as bf16"
            raise UsageError(word(name, got=got, allowed=f"have scales below {_HALF_MOST:g}", where=_WHERE, fix=fix))
        off = ((half.float() - scale).abs() / scale.abs().clamp(min=1e-38)).max() if scale.numel() else 0.0
        body = _nibbles(packed) if kind == "q4_0" else value.unflatten(-1, (-1, _BLOCK)).view(torch.uint8)
        return cls(_bytes(half.unsqueeze(-1).view(torch.uint8), body), float(off))


def _nibbles(packed: Packed) -> Tensor:
    """(..., O, I / 32, 16): in each block the first sixteen codes in lower halves, the others in upper ones."""
    both = torch.stack((packed.code & 15, packed.code >> 4), -1).flatten(-2).unflatten(-1, (-1, 2, _BLOCK // 2))
    return both[..., 0, :] | (both[..., 1, :] << 4)


def _bytes(scale: Tensor, body: Tensor) -> np.ndarray:
    return torch.cat((scale, body), -1).flatten(-2).contiguous().numpy()
