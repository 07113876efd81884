"""Round to nearest: every weight becomes the level that is nearest to it."""

import dataclasses

import torch
from torch import Tensor

from turnout.errors import ShapeError, UsageError, word
from turnout.reshape.quantize.codebooks import Codebook
from turnout.types import Packed

__all__ = ["Coded", "check_scale", "check_weight", "nearest"]

_WHERE = "turnout.reshape.quantize"


@dataclasses.dataclass(frozen=True, eq=False)
class Coded:
    """Weights of a matrix or stack as places in a codebook, with the scale of each group.

    Args:
        index: (..., O, I) int64.
        scale: (..., O, I / group) fp32, as ``Codebook.scale`` gives it.
        group: how many neighbouring inputs share a scale.
        book: the codebook.

    Source: none; plain bookkeeping.
    """

    index: Tensor
    scale: Tensor
    group: int
    book: Codebook

    def written_out(self) -> Tensor:
        """(..., O, I) fp32, the weights that they stand for."""
        return self.book.value(self.index, self.scale.repeat_interleave(self.group, -1))

    def packed(self, dtype: torch.dtype) -> Packed:
        """The same in bytes, with scales in the dtype that they were rounded to; for 4 and 8 bits.

        Raises:
            UsageError: other bits.
        """
        book, scale = self.book, (self.scale / self.book.unit).to(dtype)
        value = self.index - book.unit if book.one_sided else self.index
        levels = None if book.one_sided else book.level_N.to(scale.device)
        return Packed.of(value.to(torch.int16), scale, group=self.group, bits=book.bits, levels=levels)


def nearest(weight: Tensor, book: Codebook, group: int, *, dtype: torch.dtype = torch.float32) -> Coded:
    """Each weight at the level nearest to it, under the scale that its group's greatest asks for.

    q = argmin over levels l of |w - s l|, with s = max |w| over the group.

    Args:
        weight: (..., O, I), finite.
        book: the levels.
        group: how many neighbouring inputs share a scale; divides I.
        dtype: that scales are rounded to, before weights are.

    Raises:
        ShapeError: the group does not divide.
        UsageError: a weight is not finite, or a scale too large for its dtype.

    >>> from turnout.reshape.quantize.codebooks import codebook
    >>> nearest(torch.tensor([[0.5, -2.0, 1.1, 0.1]]), codebook("int", 4), 4).written_out()
    tensor([[ 0.5000, -2.0000,  1.0000,  0.0000]])

    Source: Dettmers and Zettlemoyer, 2023, "The case for 4-bit precision: k-bit Inference Scaling Laws", section 2.
    """
    check_weight(weight, group)
    scale = book.scale(weight, group, dtype)
    check_scale(scale, dtype)
    return Coded(book.index(weight, scale.repeat_interleave(group, -1)), scale, group, book)


def check_weight(weight: Tensor, group: int) -> None:
    """Refuses what cannot be brought to levels.

    Raises:
        ShapeError: the group does not divide.
        UsageError: a weight is not finite.
    """
    inner = weight.shape[-1]
    if group < 1 or inner % group:
        near = max(n for n in range(1, inner + 1) if inner % n == 0 and n <= max(group, 1))
        allowed, fix = f"divide the {inner} inputs", f"pass group={near}"
        raise ShapeError(word("group", got=group, allowed=allowed, where=_WHERE, fix=fix))
    if not bool(torch.isfinite(weight).all()):
        got, fix = "one that is not finite", "start from weights that were saved before it"
        raise UsageError(word("every weight", got=got, allowed="be finite", where=_WHERE, fix=fix))


def check_scale(scale: Tensor, dtype: torch.dtype) -> None:
    """Refuses scales that their dtype cannot hold.

    Raises:
        UsageError: one is not finite.
    """
    if not bool(torch.isfinite(scale).all()):
        got, fix = f"one beyond the reach of {dtype}", "pass scale='bfloat16'"
        raise UsageError(word("every scale", got=got, allowed="be finite", where=_WHERE, fix=fix))
