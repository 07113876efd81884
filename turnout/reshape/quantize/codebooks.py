"""The data types of few bits: which numbers of [-1, 1] the codes of a group of weights stand for."""

import dataclasses
import math
from typing import Literal

import torch
from torch import Tensor

from turnout.errors import UsageError, nearest, word

__all__ = ["CODES", "Codebook", "Codes", "codebook", "float_levels", "int_levels", "nf4_levels", "quantile_levels"]

Codes = Literal["int", "float", "nf4", "quantile"]
CODES = ("int", "float", "nf4", "quantile")
_WHERE = "turnout.reshape.quantize"
# NF4's outermost quantile: the mean of 1 - 1/30 and 1 - 1/32, as half of 15 and of 16 equal shares are cut off.
_NF4_END = (2 - 1 / 30 - 1 / 32) / 2
# Weights that quantiles are estimated from, at most; torch.quantile takes no more than 2^24.
_SAMPLE = 1 << 20


@dataclasses.dataclass(frozen=True, eq=False)
class Codebook:
    """What the codes of k bits stand for, and how a group of weights is brought to it.

    A group's scale s brings its weight of greatest magnitude to an end of [-1, 1]: to -1 where ``one_sided``, so that
    a type with 2^k values, one more below zero than above, wastes none; s has the sign that this takes.

    Args:
        level_N: (2^k,) fp32 in ascending order, within [-1, 1].
        one_sided: whether -1 is there and 1 is not.

    >>> book = codebook("int", 4)
    >>> scale = book.scale(torch.tensor([[0.5, 2.0, -1.0, 0.0]]), 4)
    >>> scale, book.index(torch.tensor([[0.5, 2.0, -1.0, 0.0]]), scale.repeat_interleave(4, -1)) - 8
    (tensor([[-2.]]), tensor([[-2, -8,  4,  0]]))

    Source: Dettmers and Zettlemoyer, 2023, "The case for 4-bit precision: k-bit Inference Scaling Laws", section 2. The
    sign of the scale is that of llama.cpp's Q4_0; they cut the value without a counterpart off instead.
    """

    level_N: Tensor
    one_sided: bool = False

    @property
    def bits(self) -> int:
        """How many bits a code has."""
        return len(self.level_N).bit_length() - 1

    @property
    def unit(self) -> int:
        """What a scale is divided by where values are whole numbers: Packed's value is level times this."""
        return 2 ** (self.bits - 1) if self.one_sided else 1

    def scale(self, weight: Tensor, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., I / group) fp32, numbers of ``dtype`` times ``unit``: what brings each group to [-1, 1].

        Args:
            weight: (..., I).
            group: how many neighbours share a scale; divides I.
            dtype: that scales are rounded to before any weight is.
        """
        grouped = weight.float().unflatten(-1, (-1, group))
        most = grouped.abs().amax(-1)
        if self.one_sided:
            first = grouped.abs().argmax(-1, keepdim=True)
            most = -grouped.gather(-1, first).squeeze(-1)
        return (most / self.unit).to(dtype).float() * self.unit

    def index(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The place of the level nearest to weight / scale, int64, for each weight with a scale of its own."""
        ratio = weight.float() / torch.where(scale == 0, 1.0, scale)
        between_N = (self.level_N[1:] + self.level_N[:-1]) / 2
        return torch.bucketize(ratio.contiguous(), between_N.to(weight.device))

    def value(self, index: Tensor, scale: Tensor) -> Tensor:
        """The weights again, fp32."""
        return self.level_N.to(index.device)[index] * scale


def codebook(codes: str, bits: int, *, weight: Tensor | None = None, group: int | None = None) -> Codebook:
    """The codebook of a data type.

    Args:
        codes: "int", "float", "nf4" or "quantile".
        bits: k, 3 to 8; 4 for "nf4".
        weight: (..., I), for "quantile", whose levels come from it.
        group: of its scales; None for I.

    Raises:
        UsageError: bits out of range, or no weights for quantiles.
        UnknownNameError: no such type.

    >>> codebook("int", 3).level_N
    tensor([-1.0000, -0.7500, -0.5000, -0.2500,  0.0000,  0.2500,  0.5000,  0.7500])

    Source: see each of the four.
    """
    if codes not in CODES:
        raise nearest(codes, CODES, kind="codes", where=_WHERE)
    if not isinstance(bits, int) or isinstance(bits, bool) or not 3 <= bits <= 8:
        near = 8 if isinstance(bits, int) and bits > 8 else 4
        raise UsageError(word("bits", got=bits, allowed="be from 3 to 8", where=_WHERE, fix=f"pass bits={near}"))
    if codes == "int":
        return Codebook(int_levels(bits), one_sided=True)
    if codes == "float":
        return Codebook(float_levels(bits))
    if codes == "nf4":
        if bits != 4:
            fix = "pass bits=4, or codes='int'"
            raise UsageError(word("bits", got=bits, allowed="be 4 with codes='nf4'", where=_WHERE, fix=fix))
        return Codebook(nf4_levels())
    if weight is None:
        fix = "pass weight=..., whose quantiles they are"
        raise UsageError(word("weight", got=None, allowed="be given for quantiles", where=_WHERE, fix=fix))
    grouped = weight.float().unflatten(-1, (-1, weight.shape[-1] if group is None else group))
    most = grouped.abs().amax(-1, keepdim=True)
    return Codebook(quantile_levels(grouped / torch.where(most == 0, 1.0, most), bits))


def int_levels(bits: int) -> Tensor:
    """(2^k,) the whole numbers -2^(k-1) to 2^(k-1) - 1, over 2^(k-1).

    Source: Dettmers and Zettlemoyer, 2023, section 2.2, who leave the first out.
    """
    half = 2 ** (bits - 1)
    return torch.arange(-half, half).float() / half


def float_levels(bits: int, *, exponent: int | None = None) -> Tensor:
    """(2^k,) a sign, E bits of exponent and the rest of mantissa, over the largest; zero is there twice.

    With e > 0 the value is 2^(e-1) (1 + m / 2^M), with e = 0 it is m / 2^M, no infinities. A scale takes any bias in.

    Args:
        bits: k.
        exponent: E; None for half of the bits, rounded up, which they found best.

    >>> float_levels(4)[8:] * 6  # E2M1
    tensor([0.0000, 0.5000, 1.0000, 1.5000, 2.0000, 3.0000, 4.0000, 6.0000])

    Source: Dettmers and Zettlemoyer, 2023, section 2.2. Numbers below the first power of two are spaced evenly, as IEEE
    754 has them; those of bitsandbytes leave a gap there.
    """
    exponent = -(-bits // 2) if exponent is None else exponent
    steps = 2 ** (bits - 1 - exponent)
    mantissa_M = torch.arange(steps).double() / steps
    normal_EM = 2.0 ** torch.arange(2**exponent - 1).double()[:, None] * (1 + mantissa_M)
    half_N = torch.cat((mantissa_M, normal_EM.flatten()))
    half_N = half_N / half_N[-1]
    return torch.cat((-half_N.flip(0), half_N)).float()


def nf4_levels() -> Tensor:
    """(16,) quantiles of the normal distribution, eight below zero, zero, and seven above, over the largest.

    >>> nf4_levels()[[0, 1, 7, 8, 15]]
    tensor([-1.0000, -0.6962,  0.0000,  0.0796,  1.0000])

    Source: Dettmers et al., 2023, "QLoRA: Efficient Finetuning of Quantized LLMs", section 3 and the released code.
    """
    above_N, below_N = (torch.linspace(_NF4_END, 0.5, count, dtype=torch.float64)[:-1] for count in (9, 8))
    normal_N = torch.cat((-_ppf(below_N), torch.zeros(1, dtype=torch.float64), _ppf(above_N).flip(0)))
    return (normal_N / normal_N.abs().max()).float()


def _ppf(share_N: Tensor) -> Tensor:
    """The quantiles of the standard normal distribution."""
    return math.sqrt(2) * torch.erfinv(2 * share_N - 1)


def quantile_levels(ratio: Tensor, bits: int) -> Tensor:
    """(2^k,) the middles between 2^k + 1 even quantiles of these numbers, each side stretched to its end of [-1, 1].

    The one nearest to zero is zero.

    Args:
        ratio: weights over the largest of their group, any shape.
        bits: k.

    >>> quantile_levels(torch.linspace(-1, 1, 1001), 3)[[0, 4, 7]]
    tensor([-1.,  0.,  1.])

    Source: Dettmers and Zettlemoyer, 2023, section 2.2, equation 5. They take quantiles of the whole matrix and stretch
    by the largest; we take those of what is to be coded, and each side's own largest, so that no group's is cut off.
    """
    flat_N = ratio.detach().float().flatten()
    flat_N = flat_N[:: -(-len(flat_N) // _SAMPLE)]
    at_N = torch.quantile(flat_N, torch.linspace(0, 1, 2**bits + 1, device=flat_N.device))
    level_N = (at_N[1:] + at_N[:-1]) / 2
    below, above = (-level_N.min()).clamp_min(1e-30), level_N.max().clamp_min(1e-30)
    level_N = torch.where(level_N < 0, level_N / below, level_N / above).clamp(-1, 1)
    level_N[level_N.abs().argmin()] = 0.0
    return level_N.cpu()
