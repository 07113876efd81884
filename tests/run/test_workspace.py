"""Room in huge pages behaves like any tensor."""

import gc

import pytest
import torch

from turnout.run.workspace import room, room_like

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 3), (5, 7), (1200, 1025)])
def test_shape_dtype_and_alignment(shape, dtype):
    tensor = room(shape, dtype, CPU)
    assert tensor.shape == shape and tensor.dtype == dtype and tensor.is_contiguous()
    assert tensor.numel() == 0 or tensor.data_ptr() % 64 == 0


def test_outlives_everything_but_itself():
    view = room((3, 1 << 20), torch.float32, CPU).fill_(2)[1]
    gc.collect()
    other = room((3, 1 << 20), torch.float32, CPU).fill_(3)
    assert view.sum() == 2 << 20 and other[0, 0] == 3


@pytest.mark.parametrize("shape", [(3, 4, 5), (3, 1, 5), (3, 4, 1)])
def test_room_for_a_gradient_has_the_layout_of_the_weights(shape):
    E, inside, outside = shape
    logical, stored = torch.empty(shape), torch.empty(E, outside, inside).transpose(1, 2)
    assert room_like(logical).is_contiguous() and room_like(logical).shape == shape
    assert room_like(stored).transpose(1, 2).is_contiguous() and room_like(stored).shape == shape
