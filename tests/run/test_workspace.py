"""Room in huge pages behaves like any tensor."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from turnout.run import workspace
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


def test_memory_is_used_again_once_nothing_lies_in_it_and_never_before():
    shape = (5, 1 << 18)
    first = room(shape, torch.float32, CPU)
    address = first.data_ptr()
    view = first[2]
    del first
    second = room(shape, torch.float32, CPU)
    assert second.data_ptr() != address, "a view still lies in the first block"
    del view
    gc.collect()
    assert room(shape, torch.float32, CPU).data_ptr() == address


def test_idle_memory_goes_back():
    room((9, 1 << 20), torch.float32, CPU)
    before = sum(block.nbytes for block, _ in workspace._blocks.values())
    for _ in range(2 * workspace._PATIENCE):
        room((1 << 20,), torch.float32, CPU)
    assert sum(block.nbytes for block, _ in workspace._blocks.values()) <= before - (36 << 20)


def test_threads_never_share_a_block():
    def fill(value):
        for _ in range(20):
            block = room((1 << 20,), torch.float32, CPU).fill_(value)
            assert bool((block == value).all())
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(8)))
