"""Kernels written in Python, compiled by numba when they are first called; without numba nothing here is needed.

A kernel is a plain function over numpy arrays (``array`` gives the view of a tensor: bfloat16 as uint16, float16 as
int16, which numba knows no arithmetic for) that calls other kernels and what ``Lazy`` makes. Importing this imports no
numba. What was compiled is kept on disk (``turnout.run.compiled.saved``).
"""

import functools
import importlib
import importlib.util
import os
import threading
from collections.abc import Callable
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from turnout.errors import MissingExtraError, word
from turnout.run.compiled.saved import keep
from turnout.run.composed import transformed

__all__ = ["Kernel", "Lazy", "array", "compiled_here", "kernel", "takes", "threads", "why_not_compiled"]

_OLDEST = (0, 68)
# What may be done to sums: to order them anew, and to fuse products into them. NaN and infinity stay what they are.
_FREE = frozenset({"reassoc", "contract", "nsz", "arcp"})
_PLAIN = (Tensor, torch.nn.Parameter)
_AS = {torch.bfloat16: torch.uint16, torch.float16: torch.int16, torch.float8_e8m0fnu: torch.uint8}
_TURN = threading.Lock()  # numba's simplest pool of threads ends the process when two callers meet in it
_MAKING = threading.RLock()
_alone = False  # in a forked child no pool of threads works: none of the parent's threads lives there


def _after_fork() -> None:
    global _alone, _MAKING
    _alone, _MAKING = True, threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def compiled_here() -> bool:
    """Whether kernels can be compiled on this machine.

    >>> compiled_here() == (why_not_compiled() is None)
    True

    Source: none; plain bookkeeping.
    """
    return _why(os.environ.get("TURNOUT_COMPILED")) is None


def why_not_compiled() -> str | None:
    """Why no kernel can be compiled here, in words; None where they can.

    >>> why_not_compiled() is None or "numba" in why_not_compiled() or "TURNOUT_COMPILED" in why_not_compiled()
    True

    Source: none; plain bookkeeping.
    """
    return _why(os.environ.get("TURNOUT_COMPILED"))


@functools.cache
def _why(wanted: str | None) -> str | None:
    if wanted == "0":
        return "TURNOUT_COMPILED=0 is set"
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed: pip install 'turnout[cpu]'"
    try:
        numba = importlib.import_module("numba")
    except Exception as error:  # an import that fails may fail in any way: it refuses a numpy, or a library is missing
        return f"numba cannot be imported: {error}"
    if numba.config.DISABLE_JIT:
        return "NUMBA_DISABLE_JIT is set"
    if tuple(int(part) for part in numba.__version__.split(".")[:2]) < _OLDEST:
        return f"numba {numba.__version__} is older than {'.'.join(map(str, _OLDEST))}: pip install -U 'turnout[cpu]'"
    return None


def takes(*tensors: Tensor | None) -> bool:
    """Whether kernels may see these: plain tensors with memory of their own on a CPU, in no tracing of torch's.

    Nor where something counts or replaces torch's operations (``TorchDispatchMode``): it would miss a kernel's.

    >>> takes(torch.ones(2), None), takes(torch.ones(2, device="meta"))
    (True, False)

    Source: none; plain bookkeeping.
    """
    return (
        not torch.compiler.is_compiling()
        and not transformed()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()  # by torch.jit, which sees nothing of kernels
        and all(
            one is None or (type(one) in _PLAIN and one.layout == torch.strided and one.is_cpu and not one.is_neg())
            for one in tensors
        )
    )


def array(tensor: Tensor) -> np.ndarray:
    """The tensor's memory as kernels take it: bfloat16 as uint16, float16 as int16, anything else as it is.

    >>> array(torch.ones(2, dtype=torch.bfloat16))
    array([16256, 16256], dtype=uint16)

    Source: none; a view.
    """
    same = _AS.get(tensor.dtype)
    # Not Tensor.numpy(), after which torch never resizes the memory again: FSDP2 frees what it gathered so.
    plain = tensor.detach() if tensor.requires_grad else tensor
    return np.from_dlpack(plain if same is None else plain.view(same))


def threads() -> int:
    """How many threads a kernel may use: as many as torch is told, and one in a forked process.

    >>> threads() >= 1
    True

    Source: none; plain bookkeeping.
    """
    return 1 if _alone else torch.get_num_threads()


class Lazy:
    """What kernels use of numba's: made when the first kernel that uses it is compiled.

    Args:
        make: gives it, and imports numba to do so.

    >>> Lazy(lambda: importlib.import_module("math").sqrt).made()(4.0)
    2.0

    Source: none; plain bookkeeping.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._made: Any = None

    @property
    def files(self) -> set[str]:
        """The source that it comes from."""
        return {self._make.__code__.co_filename}

    def made(self) -> Any:
        """The thing itself."""
        if self._made is None:
            with _MAKING:
                self._made = self._make() if self._made is None else self._made
        return self._made

    def __call__(self, *given: Any) -> Any:
        """As it stands in the source of a kernel, which is never run as it stands."""
        return self.made()(*given)


class Kernel:
    """A function that numba compiles for the types that it is called with; what ``kernel`` makes.

    Args:
        function: plain Python over arrays and numbers; of its globals those that are a ``Kernel`` or ``Lazy`` stand
            for what they make.
        threaded: whether its outermost loop, over ``turnout.run.compiled.lanes.prange``, is for several threads.
        exact: whether every sum is taken in the order that is written, so that it has the same bits wherever its code
            ends up; otherwise sums of a loop may be taken in vectors.
        inside: whether it is a part of the kernels that call it, rather than compiled for itself, then once more with
            each of them.

    Source: Lam, Pitrou & Seibert, 2015, "Numba: A LLVM-based Python JIT Compiler".
    """

    def __init__(self, function: Any, *, threaded: bool = False, exact: bool = False, inside: bool = False) -> None:
        self._function, self._threaded, self._exact, self._inside = function, threaded, exact, inside
        self._made: dict[bool, Any] = {}
        functools.update_wrapper(self, function)

    @property
    def uses(self) -> "dict[str, Lazy | Kernel]":
        """What it is made of, by the names that it has for them."""
        known = self._function.__globals__
        named = {name: known.get(name) for name in self._function.__code__.co_names}
        return {name: one for name, one in named.items() if isinstance(one, Kernel | Lazy)}

    @property
    def files(self) -> set[str]:
        """The sources that it and all it is made of come from."""
        return {self._function.__code__.co_filename}.union(*(one.files for one in self.uses.values()))

    @functools.cached_property
    def spreads(self) -> bool:
        """Whether several threads can do it, or part of it."""
        return self._threaded or any(isinstance(one, Kernel) and one.spreads for one in self.uses.values())

    def made(self, *, threaded: bool = False) -> Any:
        """Numba's own dispatcher, for one thread or for several.

        Raises:
            MissingExtraError: nothing can be compiled here.
        """
        if threaded not in self._made:
            with _MAKING:
                if threaded not in self._made:
                    self._made[threaded] = self._build(threaded)
        return self._made[threaded]

    def _build(self, threaded: bool) -> Any:
        if (why := why_not_compiled()) is not None:
            where, fix = f"turnout.run.compiled, {self._function.__name__}", "pip install 'turnout[cpu]'"
            raise MissingExtraError(word("numba", got=why, allowed="be there and be wanted", where=where, fix=fix))
        numba = importlib.import_module("numba")
        function = self._function
        # What shares a loop among threads has no use for further ones inside; what shares none leaves it to its parts.
        inside = threaded and not self._threaded
        known = function.__globals__ | {
            name: one.made(threaded=inside and one.spreads) if isinstance(one, Kernel) else one.made()
            for name, one in self.uses.items()
        }
        own = FunctionType(function.__code__, known, function.__name__, function.__defaults__, function.__closure__)
        own.__module__, own.__qualname__ = function.__module__, function.__qualname__
        free = False if self._exact else set(_FREE)
        options = {"nogil": True, "fastmath": free, "parallel": threaded and self._threaded, "error_model": "numpy"}
        # Code that is free to be summed otherwise in another place is never called there, but a part of what calls it.
        options["forceinline"] = not self._exact
        dispatcher = numba.njit(**options, inline="always" if self._inside else "never")(own)
        keep(dispatcher, self.files, threaded)
        return dispatcher

    def __call__(self, *given: Any) -> Any:
        """Its result for these arrays and numbers; by several threads where it can and torch may."""
        if self.spreads and (count := threads()) > 1 and _TURN.acquire(blocking=False):
            try:
                return self._spread(count, given)
            finally:
                _TURN.release()
        return self.made()(*given)

    def _spread(self, count: int, given: tuple[Any, ...]) -> Any:
        numba = importlib.import_module("numba")
        before = numba.get_num_threads()
        numba.set_num_threads(min(count, numba.config.NUMBA_NUM_THREADS))
        try:
            return self.made(threaded=True)(*given)
        finally:
            numba.set_num_threads(before)


def kernel(
    *, threaded: bool = False, exact: bool = False, inside: bool = False
) -> Callable[[Callable[..., Any]], Kernel]:
    """Makes a function a kernel: see ``Kernel``.

    >>> @kernel()
    ... def total(row_I):
    ...     s = np.float32(0)
    ...     for i in range(row_I.shape[0]):
    ...         s += row_I[i]
    ...     return s
    >>> total.__name__
    'total'

    Source: none; a decorator.
    """
    return functools.partial(Kernel, threaded=threaded, exact=exact, inside=inside)
