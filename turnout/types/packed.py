"""Packed: a matrix, or a stack of them, in few bits: codes, a scale for each group of inputs, what codes stand for."""

import dataclasses
from typing import Self

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word

__all__ = ["Packed"]

_WHERE = "turnout.types.Packed"
_CODE = {8: torch.int8, 4: torch.uint8}
_SCALE = (torch.float32, torch.bfloat16, torch.float16)
_LEVELS = 16  # of four bits
_PIECE = 1 << 20  # weights that are written out at once: what is there for the moment stays small, and in the caches


@dataclasses.dataclass(frozen=True, eq=False)
class Packed:
    """A matrix (O, I), or a stack (..., O, I) of them, in 8 or 4 bits a weight.

    Weight i of row o is ``value * scale[o, i // group]``. With 8 bits the value is the code, a whole number from -128
    to 127. With 4 bits two codes from 0 to 15 share a byte, of input 2i in its lower half and of input 2i + 1 in its
    upper; the value is code - 8, or ``levels[code]`` where there are levels.

    Args:
        code: 8 bits: (..., O, I) int8. 4 bits: (..., O, I / 2) uint8. Contiguous.
        scale: (..., O, I / group), fp32, bf16 or fp16. Contiguous.
        group: how many neighbouring inputs share a scale; divides I, and is I for one scale a row.
        bits: 8 or 4.
        levels: (16,) fp32, what the codes of 4 bits stand for; None for code - 8. Contiguous.

    Raises:
        UsageError: other bits, another dtype, levels with 8 bits, or memory that is not contiguous.
        ShapeError: shapes that do not fit each other, or a group that does not divide I.

    >>> two_OI = torch.tensor([[1, -8, 7, 0], [0, 1, 2, 3]])
    >>> packed = Packed.of(two_OI, torch.tensor([[0.5, 1.0], [2.0, 4.0]]), group=2, bits=4)
    >>> packed.code.shape, packed.shape, packed.memory_bytes
    (torch.Size([2, 2]), (2, 4), 20)
    >>> packed.dequantised()
    tensor([[ 0.5000, -4.0000,  7.0000,  0.0000],
            [ 0.0000,  2.0000,  8.0000, 12.0000]])

    Source: Dettmers et al., 2022, "LLM.int8()" (one scale a row); Dettmers and Zettlemoyer, 2023, "The case for 4-bit
    precision: k-bit Inference Scaling Laws" (groups, and levels that are a data type).
    """

    code: Tensor
    scale: Tensor
    group: int
    bits: int
    levels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.bits not in _CODE:
            near = 8 if isinstance(self.bits, int) and self.bits > 4 else 4
            raise _wrong("bits", self.bits, "be 8 or 4, which fill whole bytes", f"pass bits={near}")
        _check_dtypes(self)
        _check_shapes(self)

    @classmethod
    def of(cls, value: Tensor, scale: Tensor, *, group: int, bits: int, levels: Tensor | None = None) -> Self:
        """From one whole number for each weight: the value itself, or with ``levels`` its place among them.

        Args:
            value: (..., O, I) whole numbers of any integer dtype, -128 to 127 with 8 bits, -8 to 7 with 4 bits, 0 to
                15 with levels.
            scale: as the field.
            group: as the field.
            bits: as the field.
            levels: as the field.

        Raises:
            UsageError: as the class, or a number out of range.
            ShapeError: as the class, or an odd I with 4 bits.
        """
        if bits not in _CODE:  # said by the class
            return cls(value, scale, group, bits, levels)
        if value.is_floating_point():
            raise _wrong("value", str(value.dtype), "be whole numbers", "round it, and pass value.to(torch.int8)")
        low, high = (0, _LEVELS - 1) if levels is not None else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        if value.numel() and value.device.type != "meta":
            least, most = (int(bound) for bound in value.aminmax())
            if least < low or most > high:
                allowed = f"be from {low} to {high} with bits={bits}"
                raise _wrong("value", f"{least} to {most}", allowed, f"pass value.clamp({low}, {high})")
        if bits == 8:
            return cls(value.to(torch.int8).contiguous(), scale, group, bits, levels)
        if value.shape[-1] % 2:
            raise _unfit("value", f"{value.shape[-1]} inputs", "have an even number with bits=4", "pass bits=8")
        code = (value if levels is not None else value + _LEVELS // 2).to(torch.uint8)
        return cls(code[..., 0::2] | (code[..., 1::2] << 4), scale, group, bits, levels)

    @property
    def shape(self) -> tuple[int, ...]:
        """(..., O, I), of the weights."""
        return (*self.code.shape[:-1], self.code.shape[-1] * (8 // self.bits))

    @property
    def memory_bytes(self) -> int:
        """What codes and scales take; levels are a constant of the data type."""
        return self.code.nbytes + self.scale.nbytes

    @property
    def bits_per_weight(self) -> float:
        """Bits a weight, scales included."""
        return 8 * self.memory_bytes / max(1, self.code.numel() * (8 // self.bits))

    def values(self) -> Tensor:
        """(..., O, I) int8: what ``of`` was given."""
        if self.bits == 8:
            return self.code
        both = torch.stack((self.code & (_LEVELS - 1), self.code >> 4), -1).flatten(-2).to(torch.int8)
        return both if self.levels is not None else both - _LEVELS // 2

    @torch.no_grad()
    def dequantised(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., O, I), the weights: value times scale in fp32, rounded once to ``dtype``. Scales get no gradients."""
        weight = torch.empty(self.shape, dtype=dtype, device=self.code.device)
        each = max(1, _PIECE // max(1, self.shape[-1]))
        pieces = (tensor.flatten(0, -2).split(each) for tensor in (weight, self.code, self.scale))
        for some, code, scale in zip(*pieces, strict=True):
            value = dataclasses.replace(self, code=code, scale=scale).values()
            real = value.float() if self.levels is None else self.levels[value.int()]
            grouped = real.unflatten(-1, (-1, self.group)) * scale.float().unsqueeze(-1)
            some.copy_(grouped.flatten(-2))
        return weight

    def __getitem__(self, index: int | slice) -> Self:
        """One matrix of a stack, or some of them; nothing is copied."""
        if len(self.shape) < 3:
            raise _unfit("the stack", f"one matrix of shape {self.shape}", "have three dimensions", "use it as it is")
        return dataclasses.replace(self, code=self.code[index], scale=self.scale[index])

    def chosen(self, index_N: Tensor) -> Self:
        """The matrices of a stack with these numbers; a copy."""
        return dataclasses.replace(self, code=self.code[index_N], scale=self.scale[index_N])

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        levels = None if self.levels is None else self.levels.to(device)
        return dataclasses.replace(self, code=self.code.to(device), scale=self.scale.to(device), levels=levels)

    def __repr__(self) -> str:
        named = "" if self.levels is None else ", levels"
        return f"Packed({'x'.join(map(str, self.shape))}, bits={self.bits}, group={self.group}{named})"


def _check_dtypes(packed: Packed) -> None:
    wanted = _CODE[packed.bits]
    if packed.code.dtype != wanted:
        fix = "pass code.view(torch.int8)" if packed.bits == 8 else "build it with Packed.of"
        raise _wrong("code", str(packed.code.dtype), f"be {wanted} with bits={packed.bits}", fix)
    if packed.scale.dtype not in _SCALE:
        raise _wrong("scale", str(packed.scale.dtype), "be fp32, bf16 or fp16", "pass scale.float()")
    for name, tensor in (("code", packed.code), ("scale", packed.scale), ("levels", packed.levels)):
        if tensor is not None and not tensor.is_contiguous():
            raise _wrong(name, f"strides {tensor.stride()}", "be contiguous", f"pass {name}.contiguous()")
    levels = packed.levels
    if levels is None:
        return
    if packed.bits != 4:
        raise _wrong("levels", f"them with bits={packed.bits}", "come with bits=4 alone", "pass levels=None, or bits=4")
    if levels.dtype != torch.float32 or tuple(levels.shape) != (_LEVELS,):
        got = f"{levels.dtype} of shape {tuple(levels.shape)}"
        raise _wrong("levels", got, f"be fp32 of shape ({_LEVELS},)", "pass one value for each code")


def _check_shapes(packed: Packed) -> None:
    if packed.code.ndim < 2:
        got = f"shape {tuple(packed.code.shape)}"
        raise _unfit("code", got, "be a matrix or a stack of them", "pass code[None] for one row")
    inner, group = packed.shape[-1], packed.group
    if not isinstance(group, int) or isinstance(group, bool) or group < 1 or inner % group:
        near = max((n for n in range(1, inner + 1) if inner % n == 0 and n <= _sane(group)), default=1)
        raise _unfit("group", group, f"divide the {inner} inputs", f"pass group={near}")
    shape = (*packed.code.shape[:-1], inner // group)
    if tuple(packed.scale.shape) != shape:
        got = f"shape {tuple(packed.scale.shape)}"
        raise _unfit("scale", got, f"have shape {shape}, one for each group of {group}", "pass the scales of this code")


def _sane(group: object) -> float:
    return group if isinstance(group, int) and group > 0 else float("inf")


def _wrong(what: str, got: object, allowed: str, fix: str) -> UsageError:
    return UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))


def _unfit(what: str, got: object, allowed: str, fix: str) -> ShapeError:
    return ShapeError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))
