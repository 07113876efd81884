"""Packed: what goes in comes out, whatever the bits, groups and stacks; what does not fit is refused by name."""

import pytest
import torch

from turnout.errors import ShapeError, UsageError
from turnout.types import Packed

NF4_LIKE = torch.linspace(-1, 1, 16)


def drawn(*shape: int, bits: int, group: int, levels: bool = False, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(sum(shape) + bits)
    low, high = (0, 16) if levels else (-(2 ** (bits - 1)), 2 ** (bits - 1))
    value = torch.randint(low, high, shape, generator=generator)
    scale = (torch.rand(*shape[:-1], shape[-1] // group, generator=generator) + 0.1).to(dtype)
    return value, scale, Packed.of(value, scale, group=group, bits=bits, levels=NF4_LIKE if levels else None)


@pytest.mark.parametrize("shape", [(3, 8), (2, 3, 8), (2, 2, 1, 8), (0, 8)])
@pytest.mark.parametrize(("bits", "levels"), [(8, False), (4, False), (4, True)])
@pytest.mark.parametrize("group", [2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_weight_is_its_value_times_its_scale(shape, bits, levels, group, dtype):
    value, scale, packed = drawn(*shape, bits=bits, group=group, levels=levels, dtype=dtype)
    assert packed.shape == shape and torch.equal(packed.values().long(), value)
    real = NF4_LIKE[value] if levels else value.float()
    expected = real * scale.float().repeat_interleave(group, -1)
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(packed.dequantised(kind), expected.to(kind))


def test_even_inputs_lie_in_the_lower_half_of_a_byte():
    packed = Packed.of(torch.tensor([[-8, 7, 1, -1]]), torch.ones(1, 1), group=4, bits=4)
    assert packed.code.tolist() == [[0xF0, 0x79]]
    assert Packed.of(torch.tensor([[-128, 127]]), torch.ones(1, 1), group=2, bits=8).code.tolist() == [[-128, 127]]


def test_a_stack_gives_its_matrices_without_a_copy():
    _, _, packed = drawn(3, 4, 8, bits=4, group=4)
    one = packed[1]
    assert one.code.data_ptr() == packed.code[1].data_ptr()
    assert torch.equal(one.dequantised(), packed.dequantised()[1])
    assert packed[1:].shape == (2, 4, 8)
    with pytest.raises(ShapeError, match="three dimensions"):
        one[0]


def test_what_it_takes_counts_the_scales():
    packed = drawn(4, 64, bits=4, group=32, dtype=torch.bfloat16)[2]
    assert packed.memory_bytes == 4 * 32 + 4 * 2 * 2 and packed.bits_per_weight == 4.5
    assert drawn(4, 64, bits=8, group=64)[2].bits_per_weight == 8.5


def test_it_goes_to_another_device():
    packed = drawn(2, 4, bits=4, group=2, levels=True)[2].to("meta")
    assert packed.code.device.type == packed.scale.device.type == packed.levels.device.type == "meta"


CODE4, CODE8, SCALE = torch.zeros(2, 4, dtype=torch.uint8), torch.zeros(2, 8, dtype=torch.int8), torch.ones(2, 2)


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ((CODE8, SCALE, 4, 5), UsageError, "bits must be 8 or 4.*got 5.*bits=8"),
        ((CODE8, SCALE, 4, 3), UsageError, "got 3.*bits=4"),
        ((CODE8, SCALE, 3, 8), ShapeError, "group must divide the 8 inputs.*got 3.*group=2"),
        ((CODE8, SCALE, 0, 8), ShapeError, "group must divide.*group=8"),
        ((CODE8, SCALE, 8, 8), ShapeError, r"scale must have shape \(2, 1\)"),
        ((CODE8, SCALE[:1], 4, 8), ShapeError, r"scale must have shape \(2, 2\)"),
        ((CODE8, SCALE.double(), 4, 8), UsageError, "scale must be fp32, bf16 or fp16.*float64"),
        ((CODE8.view(torch.uint8), SCALE, 4, 8), UsageError, "code must be torch.int8 with bits=8"),
        ((CODE4.view(torch.int8), SCALE, 4, 4), UsageError, "code must be torch.uint8 with bits=4"),
        ((CODE4.t().contiguous().t(), SCALE, 4, 4), UsageError, "code must be contiguous"),
        ((CODE4[0], SCALE, 4, 4), ShapeError, "matrix or a stack"),
        ((CODE8, SCALE, 4, 8, NF4_LIKE), UsageError, "levels must come with bits=4"),
        ((CODE4, SCALE, 4, 4, NF4_LIKE[:8]), UsageError, r"levels must be fp32 of shape \(16,\)"),
        ((CODE4, SCALE, 4, 4, NF4_LIKE.repeat_interleave(2)[::2]), UsageError, "levels must be contiguous"),
        ((CODE4, SCALE, 4, 4, NF4_LIKE.half()), UsageError, "levels must be fp32"),
    ],
)
def test_what_does_not_fit_is_refused(fields, error, said):
    with pytest.raises(error, match=said):
        Packed(*fields)


@pytest.mark.parametrize(
    ("value", "bits", "levels", "said"),
    [
        (torch.full((2, 8), 8), 4, None, "from -8 to 7 with bits=4.*8 to 8"),
        (torch.full((2, 8), -1), 4, NF4_LIKE, "from 0 to 15"),
        (torch.full((2, 8), 128), 8, None, "from -128 to 127"),
        (torch.ones(2, 8), 8, None, "whole numbers"),
        (torch.zeros(2, 7, dtype=torch.long), 4, None, "even number"),
        (torch.zeros(2, 8, dtype=torch.long), 5, None, "bits must be 8 or 4"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(value, bits, levels, said):
    with pytest.raises(UsageError, match=said):
        Packed.of(value, SCALE, group=4, bits=bits, levels=levels)
