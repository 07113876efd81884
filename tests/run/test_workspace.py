"""Room in huge pages behaves like any tensor."""

import copy
import gc
import os
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from turnout.paths import Bank
from turnout.run import execute, workspace
from turnout.run.workspace import room, room_like
from turnout.types import Routing

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


def fewer_counts(monkeypatch):
    """References as Python 3.14 counts them: what is passed to a function is borrowed, and not counted."""
    count = sys.getrefcount
    monkeypatch.setattr(sys, "getrefcount", lambda thing: count(thing) - 2)  # one of them is this function's own


def test_what_is_held_is_not_lent_whatever_references_are_counted(monkeypatch):
    fewer_counts(monkeypatch)
    held = [room((1 << 20,), torch.float32, CPU) for _ in range(4)]
    assert len({tensor.data_ptr() for tensor in held}) == 4


def test_gradients_are_right_whatever_references_are_counted(monkeypatch):
    fewer_counts(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    T, D, E, F = 64, 256, 16, 256  # both stacks have as many numbers, and 4 MB
    bank = Bank(E, D, F, activation="relu", std=0.1, generator=generator)
    index_TK, x_TD = torch.rand(T, E, generator=generator).topk(2).indices, torch.randn(T, D, generator=generator)
    routing = Routing.from_topk(index_TK, torch.full((T, 2), 0.5), num_experts=E)
    slopes = []
    for backend in ("reference", "sort"):
        y_TD = execute(x_TD, routing, bank.weights(), backend=backend)
        slopes += torch.autograd.grad(y_TD.square().sum(), (bank.up, bank.down))
    for right, ours in zip(slopes[:2], slopes[2:], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


@pytest.mark.parametrize(
    "keep",
    [
        lambda tensor: tensor.detach()[1:],
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.untyped_storage(),
        torch.utils.dlpack.to_dlpack,
        lambda tensor: tensor.view(torch.uint8),
        lambda tensor: torch.nn.Parameter(tensor).data,
        lambda tensor: tensor.clone().requires_grad_().mul(tensor),  # kept for the backward pass
    ],
)
def test_whatever_keeps_the_memory_keeps_the_loan(keep):
    tensor = room((1 << 20,), torch.float32, CPU).fill_(1)
    address, kept = tensor.data_ptr(), keep(tensor)
    del tensor
    gc.collect()
    assert all(room((1 << 20,), torch.float32, CPU).data_ptr() != address for _ in range(3))
    del kept
    gc.collect()
    new = [room((1 << 20,), torch.float32, CPU) for _ in range(6)]
    assert address in {tensor.data_ptr() for tensor in new}


def test_copies_have_memory_of_their_own():
    tensor = room((1 << 20,), torch.float32, CPU).fill_(1)
    for made in (copy.deepcopy(tensor), pickle.loads(pickle.dumps(tensor))):
        assert made.data_ptr() != tensor.data_ptr() and torch.equal(made, tensor)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_has_its_own():
    tensor = room((1 << 20,), torch.float32, CPU).fill_(1)
    child = os.fork()
    if child == 0:  # no assertion may leave this branch, and no handler of the tests run at its end
        other = room((1 << 20,), torch.float32, CPU).fill_(2)
        os._exit(0 if other.data_ptr() != tensor.data_ptr() and float(tensor[0]) == 1 else 1)
    assert os.waitpid(child, 0)[1] == 0 and float(tensor.sum()) == 1 << 20


def test_idle_memory_goes_back():
    room((9, 1 << 20), torch.float32, CPU)
    before = workspace._pool.idle_bytes
    for _ in range(2 * workspace._PATIENCE):
        room((1 << 20,), torch.float32, CPU)
    assert workspace._pool.idle_bytes <= before - (36 << 20)


def test_threads_never_share_a_block():
    def fill(value):
        for _ in range(20):
            block = room((1 << 20,), torch.float32, CPU).fill_(value)
            assert bool((block == value).all())
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(8)))
