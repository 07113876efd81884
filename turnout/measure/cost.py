"""What running something costs, counted rather than calculated; and on which machine."""

import fnmatch
import warnings
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from turnout.errors import UsageError, word
from turnout.expects import CALLED, expects
from turnout.types import Cost

__all__ = ["count_flops", "count_params"]

_aten = torch.ops.aten


@expects(run=CALLED)
def count_flops(run: Callable[[], object]) -> Cost:
    """The floating-point operations of one call, counted operator by operator; a multiply-add counts 2.

    Matrix products, convolutions and attention count; element-wise work does not. Attention counts all S x S
    pairs, causal or not, as the kernels are asked for them. A product that the counter does not know warns,
    because the count would be too low. A call with ``backward()`` in it counts the backward pass too.

    Args:
        run: what to count, called once, as it is (under ``torch.no_grad()`` if it says so).

    Returns:
        A Cost with only ``flops``.

    >>> layer = nn.Linear(8, 4, bias=False)
    >>> count_flops(lambda: layer(torch.ones(3, 8))).flops
    192.0

    Source: torch.utils.flop_counter, whose table lacks grouped products and the attention kernel of the CPU; both
    are added here.
    """
    seen = _Seen()
    counter = FlopCounterMode(display=False, custom_mapping=_EXTRA)
    with seen, counter:
        run()
    known = {str(packet) for packet in counter.flop_registry}
    missing = sorted(name for name in seen.names if _is_product(name) and name not in known)
    if missing:
        warnings.warn(f"count_flops cannot count {', '.join(missing)}; the count is too low", stacklevel=2)
    return Cost(flops=float(counter.get_total_flops()))


@expects(module=nn.Module)
def count_params(module: nn.Module, *, active: Mapping[str, float] | None = None) -> Cost:
    """The parameters that a module holds, each counted once however often it is shared, and those a token uses.

    Args:
        module: any module.
        active: pattern of parameter names (``"*.bank.*"``) -> the share of them that one token uses, in [0, 1];
            K / E for a bank of experts. Parameters that match no pattern are used by every token.

    Returns:
        A Cost with ``params`` and ``params_active``.

    Raises:
        UsageError: a pattern that matches no parameter, or a share outside [0, 1].

    >>> model = nn.ModuleDict({"bank": nn.Linear(8, 4, bias=False), "head": nn.Linear(2, 2, bias=False)})
    >>> count_params(model, active={"bank.*": 0.25})
    Cost(params=36, params_active=12)

    Source: none; a count.
    """
    shares = dict(active or {})
    params, params_active, used = 0, 0.0, set()
    names = []
    for name, parameter in module.named_parameters():
        names.append(name)
        matches = [pattern for pattern in shares if fnmatch.fnmatchcase(name, pattern)]
        used.update(matches)
        params += parameter.numel()
        params_active += parameter.numel() * min((shares[pattern] for pattern in matches), default=1.0)
    wrong = [pattern for pattern in shares if pattern not in used or not 0 <= shares[pattern] <= 1]
    if wrong:
        raise UsageError(
            word(
                "active",
                got=f"{wrong[0]!r}: {shares[wrong[0]]!r}",
                allowed="map patterns that match a parameter to shares in [0, 1]",
                where="turnout.measure.count_params",
                fix=f"the parameters are {', '.join(names[:8])}{' ...' if len(names) > 8 else ''}",
            )
        )
    return Cost(params=params, params_active=round(params_active))


class _Seen(TorchDispatchMode):
    """Notes the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def _is_product(name: str) -> bool:
    """Whether an operator that reached the kernels multiplies matrices, by its name."""
    bare = name.rpartition(".")[2]
    return "mm" in bare.split("_") or any(piece in bare for piece in ("addmm", "matmul", "attention", "convolution"))


def _attention(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    batch, heads, queries, width = q_shape
    return 2 * batch * heads * queries * k_shape[-2] * (width + v_shape[-1])


def _attention_backward(grad_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    # The scores once more, then the gradients of the scores' two factors, of the values, and of the weights.
    batch, heads, queries, width = q_shape
    return 2 * batch * heads * queries * k_shape[-2] * (3 * width + 2 * v_shape[-1])


def _grouped(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    # Rows in groups times one matrix per group, (R, I) x (E, I, O); or, for the gradient of the matrices, groups of
    # columns against groups of rows, (I, R) x (R, O). Either way every row of R meets one I x O product.
    if len(a_shape) == 2:
        return 2 * a_shape[0] * a_shape[1] * b_shape[-1]
    return 2 * a_shape[-2] * a_shape[-1] * b_shape[-1] * (a_shape[0] if len(b_shape) == 3 else 1)


def _linear(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    # (M, I) by (O, I); rows in more than two dimensions are rows all the same.
    rows = 1
    for length in x_shape[:-1]:
        rows *= length
    return 2 * rows * weight_shape[0] * weight_shape[1]


def _dot(a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    size = 2
    for length in a_shape:
        size *= length
    return size


_EXTRA = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    _aten._grouped_mm: _grouped,
    _aten.mv: _dot,
    _aten.dot: _dot,
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _EXTRA[torch.ops.mkldnn._linear_pointwise] = _linear
