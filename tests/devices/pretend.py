"""A CUDA device that is none: tensors say they are on ``cuda:0``, compute on the CPU, and refuse to mix with others.

    with pretending():
        model.to("cuda")(ids.to("cuda"))      # runs
        model(ids)                            # raises, as a real device would

Every operation that reaches torch's dispatcher, also those of a backward pass, is looked at: its tensors must be on one
device, but for what a real one allows too: a CPU scalar of no dimensions beside others, CPU indices into a tensor of
the device, and copies. What reads memory without asking for the CPU first (``numpy()``) is refused as there. To torch's
own code, which has no CUDA here, the tensors are on "meta"; to Python they say ``cuda:0``.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA, META = torch.device("cuda", 0), torch.device("meta")
aten = torch.ops.aten
_INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
_COPIES = {aten._to_copy.default, aten.copy_.default}


class Mixed(RuntimeError):
    """Tensors of two devices met."""


class Pretend(torch.Tensor):
    """A tensor that says it is on ``cuda:0``; what it holds is on the CPU."""

    held: torch.Tensor
    device = property(lambda self: CUDA)  # pyrefly: ignore[bad-override]
    is_cuda = property(lambda self: True)  # pyrefly: ignore[bad-override]
    is_meta = property(lambda self: False)  # pyrefly: ignore[bad-override]
    is_cpu = property(lambda self: False)  # pyrefly: ignore[bad-override]

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "Pretend":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, held.size(), **layout, device=META)
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Pretend({self.held})"

    def tolist(self) -> Any:
        return self.held.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self.numpy()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Pretend":
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        copied._is_param = getattr(self, "_is_param", False)
        memo[id(self)] = copied
        return copied

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    asked = kwargs.get("device")
    given = [one for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor)]
    ours = [one for one in given if isinstance(one, Pretend)]
    if func not in _COPIES:
        _refuse_mixed(func, args, given, ours)
    plain_args, plain_kwargs = tree_map(lambda one: one.held if isinstance(one, Pretend) else one, (args, kwargs))
    if asked is not None:
        plain_kwargs["device"] = torch.device("cpu")
    done = func(*plain_args, **plain_kwargs)
    there = bool(ours) if asked is None else asked.type in ("cuda", "meta")
    # What is changed in place stays the tensor that it is.
    names = {id(held): one for one, held in zip(tree_flatten(args)[0], tree_flatten(plain_args)[0], strict=True)}
    if func in _COPIES and isinstance(done, torch.Tensor) and id(done) in names and asked is not None:
        done = done.clone()

    def wrap(one: Any) -> Any:
        if not isinstance(one, torch.Tensor):
            return one
        return names[id(one)] if id(one) in names else Pretend(one) if there else one

    return tree_map(wrap, done)


def _refuse_mixed(func: Any, args: Any, given: list[torch.Tensor], ours: list[torch.Tensor]) -> None:
    others = [one for one in given if not isinstance(one, Pretend)]
    if not ours or not others:
        return
    if func in _INDEXING and isinstance(args[0], Pretend):
        others = [one for one in others if not any(one is index for index in args[1])]
    if any(one.ndim for one in others):
        raise Mixed(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")


class _Names(TorchFunctionMode):
    """To torch's own code the device is called "meta": it would look for a CUDA that is not there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.device:
            return func(*args, **(kwargs or {}))
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cuda:
            return args[0].to(META)
        args, kwargs = tree_map(_renamed, (args, kwargs or {}))
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):  # so would there be none in a list of indices
            args = (args[0], _indices(args[1]), *args[2:])
        if func is torch.Tensor.new_tensor and isinstance(args[0], Pretend):  # nor would there in this
            return func(args[0].held, *args[1:], **kwargs).to(META)
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == META:
            # On "meta" there would be no numbers in it.
            return func(*args, **{**kwargs, "device": "cpu"}).to(META)
        return func(*args, **kwargs)


def _indices(index: Any) -> Any:
    if isinstance(index, tuple):
        return tuple(map(_indices, index))
    return torch.tensor(index) if isinstance(index, list) else index


def _renamed(one: Any) -> Any:
    named = isinstance(one, torch.device) or (isinstance(one, str) and one.partition(":")[0] == "cuda")
    return META if named and torch.device(one).type == "cuda" else one


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _Generator(torch.Generator):
    """A generator that says where it is."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls, device="cpu")
        made.place = CUDA if torch.device(device).type == "cuda" else torch.device("cpu")
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # pyrefly: ignore[bad-override]
        return self.place


@contextlib.contextmanager
def pretending(*, free: int = 8 * 2**30) -> Iterator[torch.device]:
    """While this is open, ``cuda:0`` is there, with so much memory that is free."""
    cuda = {
        "_lazy_init": lambda: None,  # of calls from inside of torch's Python code, which _Names does not see
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "Pretend",
        "is_bf16_supported": lambda including_emulation=True: False,
        "mem_get_info": lambda device=None: (free, 8 * 2**30),
        "device": lambda device: contextlib.nullcontext(),
        "get_rng_state": lambda device=None: torch.zeros(0),
        "set_rng_state": lambda state, device=None: None,
        "reset_peak_memory_stats": lambda device=None: None,
        "synchronize": lambda device=None: None,
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 12345,
    }
    with contextlib.ExitStack() as stack:
        for name, value in cuda.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch, "Generator", _Generator))
        stack.enter_context(_Names())
        stack.enter_context(_Mode())
        yield CUDA
