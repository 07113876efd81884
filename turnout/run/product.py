"""The dense product under everything else: which of torch's own CPU kernels computes a fp32 matrix product.

torch computes fp32 products with MKL. On processors that are not Intel's, MKL takes its AVX2 path; oneDNN, which
the same torch carries for bf16 and convolutions, uses all of AVX-512 there and is 2.2 times as fast on an AMD Zen 5
(240 against 108 GFLOP/s a core; docs/performance.md), and no faster on a Zen 4. Both round in IEEE fp32; only the order
of sums differs.
"""

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

from turnout.errors import UsageError, word
from turnout.run.composed import composes, transformed
from turnout.run.invariant_linear import invariant_linear
from turnout.run.tiled import tiled_map
from turnout.run.tuned import tuning
from turnout.types.invariant import invariant_here

__all__ = ["instead_of_linear", "linear", "own_alone", "product", "replaced"]

# What takes the place of ``linear`` in this thread, if anything.
_HERE = threading.local()


@contextlib.contextmanager
def instead_of_linear(other: Callable[..., Tensor] | None) -> Iterator[None]:
    """``linear`` of this thread is ``other`` inside, itself where that is None. A compiled model does not ask."""
    before = getattr(_HERE, "other", None)
    _HERE.other = other
    try:
        yield
    finally:
        _HERE.other = before


def replaced() -> bool:
    """Whether something takes the place of ``linear`` in this thread.

    >>> replaced()
    False

    Source: none; plain bookkeeping.
    """
    return getattr(_HERE, "other", None) is not None


def _suits(a: Tensor, b: Tensor, multiply_adds: int, *, turned: bool = False) -> bool:
    """Whether oneDNN takes these; ``turned``: the first factor lies transposed, and oneDNN copies it first."""
    if not (a.dtype == b.dtype == torch.float32 and a.is_cpu and b.is_cpu) or torch.compiler.is_compiling():
        return False
    here = tuning()
    least = here.onednn_turned if turned else here.onednn
    return least is not None and 0 < multiply_adds >= least


def own_alone(dtype: torch.dtype, multiply_adds: int) -> bool:
    """Whether ``product`` of this dtype is torch's own here up to this size: then it need not be asked each time."""
    here = tuning()
    limits = (here.onednn, here.onednn_turned)
    return dtype != torch.float32 or all(limit is None or limit > multiply_adds for limit in limits)


def _fits(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> bool:
    """Whether they are an affine map of ordinary tensors, as oneDNN's product takes it on trust."""
    if weight_OI.ndim != 2 or x.shape[-1] != weight_OI.shape[1] or transformed():
        return False
    if bias_O is not None:  # it is read as one number after another
        if bias_O.dtype != torch.float32 or bias_O.shape != weight_OI.shape[:1] or not bias_O.is_contiguous():
            return False
        if not bias_O.is_cpu or not _plain(bias_O):
            return False
    return _plain(x) and _plain(weight_OI)


def _plain(tensor: Tensor) -> bool:
    """Not of a subclass, not sparse, its negation not left for later, and no rows that share memory, as windows do."""
    if type(tensor) not in (Tensor, Parameter) or tensor.layout != torch.strided or tensor.is_neg():
        return False
    if tensor.is_contiguous():
        return True
    strides = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    return all(after == 0 or after >= stride * size for (stride, size), (after, _) in itertools.pairwise(strides))


def product(a_MK: Tensor, b_KN: Tensor, *, out_MN: Tensor | None = None) -> Tensor:
    """(M, N) = a_MK @ b_KN by the fastest kernel of this machine; outside autograd.

    Args:
        a_MK: (M, K), any strides, so that no two numbers share their memory.
        b_KN: (K, N), likewise.
        out_MN: where the result goes; a new tensor when None.

    >>> product(torch.ones(2, 3), torch.ones(3, 4)).tolist()
    [[3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]]

    Source: none; torch's own kernels.
    """
    if _suits(a_MK, b_KN, a_MK.shape[0] * b_KN.numel(), turned=not a_MK.is_contiguous()):
        # oneDNN takes its second factor in any order but copies a transposed first one: let that be the smaller, where
        # it is so by more than the result, which then comes out transposed.
        if a_MK.numel() > b_KN.numel() + a_MK.shape[0] * b_KN.shape[1] and not a_MK.is_contiguous():
            result = torch.ops.mkldnn._linear_pointwise(b_KN.t(), a_MK, None, "none", [], "").t()
        else:
            result = torch.ops.mkldnn._linear_pointwise(a_MK, b_KN.t(), None, "none", [], "")
        return result.contiguous() if out_MN is None else out_MN.copy_(result)
    return torch.mm(a_MK, b_KN) if out_MN is None else torch.mm(a_MK, b_KN, out=out_MN)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x_MI: Tensor, weight_OI: Tensor, bias_O: Tensor | None):
        ctx.save_for_backward(x_MI, weight_OI)
        return torch.ops.mkldnn._linear_pointwise(x_MI, weight_OI, bias_O, "none", [], "")

    @staticmethod
    def backward(ctx, slope_MO: Tensor):  # pyrefly: ignore[bad-override] - torch declares *grads
        x_MI, weight_OI = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        times = torch.mm if composes(slope_MO) else product
        return (
            times(slope_MO, weight_OI) if of_x else None,
            times(slope_MO.t(), x_MI) if of_weight else None,
            slope_MO.sum(0) if of_bias else None,
        )


def linear(x: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """The affine map x @ weight^T + bias, as ``torch.nn.functional.linear``, by the fastest kernel of this machine.

    Args:
        x: (..., I).
        weight_OI: (O, I).
        bias_O: (O,) or None.

    Returns:
        (..., O).

    Raises:
        UsageError: x and the weight one of them has no numbers, on the device "meta".

    >>> linear(torch.ones(2, 3), torch.ones(4, 3)).shape
    torch.Size([2, 4])

    Source: none; torch's own kernels.
    """
    if x.is_meta != weight_OI.is_meta:  # torch would give what was in memory where one of them is "meta"
        got, fix = f"{x.device} and {weight_OI.device}", "move one to the other's, or load the weights"
        where, allowed = "turnout.run.linear", "be the same"
        raise UsageError(word("the devices of x and the weight", got=got, allowed=allowed, where=where, fix=fix))
    rows = x.numel() // max(x.shape[-1], 1) if x.ndim else 0
    other = None if torch.compiler.is_compiling() else getattr(_HERE, "other", None)
    if other is not None:
        return other(x, weight_OI, bias_O)
    if x.ndim and invariant_here("turnout.run.linear"):
        return invariant_linear(x, weight_OI, bias_O)
    if x.ndim and not torch.compiler.is_compiling() and (own := tiled_map(x, weight_OI, bias_O)) is not None:
        return own
    suits = _suits(x, weight_OI, rows * weight_OI.numel()) and not torch.is_autocast_enabled("cpu")
    if not suits or not _fits(x, weight_OI, bias_O):
        return torch.nn.functional.linear(x, weight_OI, bias_O)
    return _Linear.apply(x.reshape(rows, -1), weight_OI, bias_O).view(*x.shape[:-1], -1)
