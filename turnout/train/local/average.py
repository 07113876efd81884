"""The mean of what all processes hold, begun now and waited for later; in full, or sent in few bits."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch import distributed as dist

from turnout.errors import UsageError, word

__all__ = ["BITS", "Average", "alone", "over", "payload_bytes", "rounded"]

BITS = (32, 8, 4)
_BLOCK = 256  # numbers that share one scale, so that one large entry does not round its fragment away
# E3M0, of Streaming DiLoCo: a sign, three bits of exponent and none of mantissa; the lowest exponent means zero.
_E3M0 = torch.tensor([0.0, *(2.0**-n for n in range(6, -1, -1))])


class Average(Protocol):
    """What begins to average over processes."""

    def __call__(self, mine_N: Tensor, *, bits: int) -> Callable[[], Tensor]:
        """Begins; what it returns waits for the mean, which has the type and length of ``mine_N``."""


def alone(mine_N: Tensor, *, bits: int) -> Callable[[], Tensor]:
    """The mean over this process and no other.

    Args:
        mine_N: what it holds.
        bits: that a number is sent in; nothing is sent, but it is rounded as if it were.

    Returns:
        What gives the mean.

    >>> alone(torch.tensor([1.0, 3.0]), bits=32)()
    tensor([1., 3.])

    Source: none.
    """
    held_N = rounded(mine_N, bits)
    return lambda: held_N


def over(group: "dist.ProcessGroup | None" = None) -> Average:
    """An average over the processes of a group of torch.distributed.

    32 bits are an all-reduce; fewer are gathered as packed codes and scales, decoded and summed in full precision on
    every process, in the order of the ranks, so that all have the same bits.

    Args:
        group: None is all processes.

    Raises:
        UsageError: there is no process group.

    >>> over()
    Traceback (most recent call last):
    turnout.errors.UsageError: the process group must be set up in turnout.train.local.over; got none. Nearest fix: ...

    Source: Douillard et al., 2025, "Streaming DiLoCo with Overlapping Communication": low-bit gradients are summed in
    full precision.
    """
    if not (dist.is_available() and dist.is_initialized()):
        allowed, fix = "be set up", "start with torchrun and call torch.distributed.init_process_group first"
        raise UsageError(word("the process group", got="none", allowed=allowed, where="turnout.train.local.over",
                              fix=fix))  # fmt: skip

    def begin(mine_N: Tensor, *, bits: int) -> Callable[[], Tensor]:
        world = dist.get_world_size(group)
        if bits == 32:
            sum_N = mine_N.clone()
            work = dist.all_reduce(sum_N, group=group, async_op=True)
            return lambda: _waited(work, lambda: sum_N / world)
        code, scale = _encoded(mine_N, bits)
        message = torch.cat((_packed(code, bits), scale.view(torch.uint8)))
        parts = [torch.empty_like(message) for _ in range(world)]
        work = dist.all_gather(parts, message, group=group, async_op=True)
        split = len(message) - 4 * len(scale)

        def mean() -> Tensor:
            total = torch.zeros_like(mine_N, dtype=torch.float32)
            for part in parts:
                each = _unpacked(part[:split], bits, len(code))
                total += _decoded(each, part[split:].clone().view(torch.float32), len(mine_N), bits)
            return (total / world).to(mine_N.dtype)

        return lambda: _waited(work, mean)

    return begin


def rounded(value_N: Tensor, bits: int) -> Tensor:
    """What arrives of numbers that are sent in so many bits.

    8: whole numbers from -127 to 127 times a block's largest entry over 127. 4: a sign and a power of two from 2^-6
    to 1 times the block's largest, or zero (E3M0). A block is 256 numbers.

    Args:
        value_N: one-dimensional.
        bits: 32, 8 or 4.

    Returns:
        A new tensor.

    >>> rounded(torch.tensor([1.0, -0.4, 0.001]), 4)
    tensor([ 1.0000, -0.5000,  0.0000])

    Source: Douillard et al., 2025, "Streaming DiLoCo with Overlapping Communication", which sends E3M0. Where we
    differ: the scale is a block's largest entry; the paper does not say.
    """
    if bits == 32:
        return value_N.clone()
    code, scale = _encoded(value_N, bits)
    return _decoded(code, scale, len(value_N), bits).to(value_N.dtype)


def payload_bytes(count: int, bits: int) -> int:
    """The bytes that one process hands over for so many numbers: four each at 32 bits; else codes and a scale a block.

    >>> payload_bytes(1024, 32), payload_bytes(1024, 8), payload_bytes(1024, 4)
    (4096, 1040, 528)

    Source: none; arithmetic.
    """
    if bits == 32:
        return 4 * count
    blocks = -(-count // _BLOCK)
    return blocks * _BLOCK * bits // 8 + 4 * blocks


def _waited(work: "dist.Work | None", value: Callable[[], Tensor]) -> Tensor:
    if work is not None:  # None: this process is not of the group
        work.wait()
    return value()


def _encoded(value_N: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes, filled up to whole blocks with zeros, and a scale a block."""
    blocks = -(-len(value_N) // _BLOCK)
    value = torch.nn.functional.pad(value_N.float(), (0, blocks * _BLOCK - len(value_N))).view(blocks, _BLOCK)
    scale = value.abs().amax(1)
    unit = value / scale.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    if bits == 8:
        return (unit * 127).round().to(torch.int8).view(-1).view(torch.uint8), scale
    size = unit.abs()
    # The boundary between two powers of two is their mean: rounding to the nearest.
    power = torch.bucketize(size, ((_E3M0[1:] + _E3M0[:-1]) / 2).to(size.device))
    return (power + 8 * (unit < 0)).to(torch.uint8).view(-1), scale


def _decoded(code: Tensor, scale: Tensor, count: int, bits: int) -> Tensor:
    if bits == 8:
        unit = code.view(torch.int8).float() / 127
    else:
        level = _E3M0.to(code.device)[(code & 7).long()]
        unit = torch.where(code >= 8, -level, level)
    return (unit.view(-1, _BLOCK) * scale[:, None]).view(-1)[:count]


def _packed(code: Tensor, bits: int) -> Tensor:
    return code if bits == 8 else code[::2] | (code[1::2] << 4)


def _unpacked(part: Tensor, bits: int, count: int) -> Tensor:
    if bits == 8:
        return part
    return torch.stack((part & 15, part >> 4), 1).view(count)
