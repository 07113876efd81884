"""Which executor runs, and why."""

import dataclasses

import torch
from torch import Tensor

from turnout.errors import nearest
from turnout.run.decode import suits_decoding
from turnout.run.grouped import grouped
from turnout.run.invariant import invariant_experts
from turnout.run.kernels import kernels
from turnout.run.reference import Executor, reference, trains
from turnout.run.sort import sort
from turnout.run.tuned import tuning
from turnout.types import ExpertWeights, Routing
from turnout.types.invariant import invariant_here

__all__ = ["EXECUTORS", "Choice", "choose", "execute", "features"]

EXECUTORS: dict[str, Executor] = {
    "reference": reference,
    "sort": sort,
    "grouped": grouped,
}
# By name alone, and not on a CPU. TODO: let "auto" take it on CUDA once benchmarks.gpu_layer has been run on a GPU.
_ON_CUDA: dict[str, Executor] = {"kernels": kernels}

# sort keeps half the memory and copies no weights; another executor must be faster than it by this factor.
_MARGIN = 1.25
_RULE = f"sort is taken unless another is {_MARGIN} times as fast"
# Where nothing was measured: the first that takes the dtype.
_UNMEASURED = {"cpu": ("sort",), "cuda": ("grouped", "sort")}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The name of an executor, and the reasons for it.

    >>> Choice("sort", ("the device is a CPU",)).name
    'sort'

    Source: none; plain bookkeeping.
    """

    name: str
    reasons: tuple[str, ...]


def features(entries: int, experts: int, width: int, hidden: int, gated: bool) -> tuple[float, float, float, float]:
    """What time is made of: one call, experts with entries (at most), multiply-adds, and numbers moved per entry."""
    return (
        1.0,
        min(experts, entries),
        entries * width * hidden * (3.0 if gated else 2.0),
        entries * (2.0 * width + hidden),
    )


def _situation(x_TD: Tensor, weights: ExpertWeights, routing: Routing) -> str:
    device = x_TD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TD.dtype
    train = trains(x_TD, routing, weights)
    return f"{device} {str(dtype).removeprefix('torch.')} {'training' if train else 'forward'}"


def _decodes(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> bool:
    """Whether sort has its way with few tokens, which no other executor comes near: nothing is to be predicted."""
    return suits_decoding(x_TD, routing, weights) and not trains(x_TD, routing, weights)


def _predict(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> tuple[str, dict[str, float]]:
    """The situation, and the predicted seconds of each executor measured in it, the fastest first."""
    situation = _situation(x_TD, weights, routing)
    measured = tuning().seconds.get(situation, {})
    sizes = features(routing.num_entries, routing.num_experts, weights.width, weights.hidden, weights.gated)
    seconds = {name: sum(a * b for a, b in zip(each, sizes, strict=True)) for name, each in measured.items()}
    if weights.width % 8 or weights.hidden % 8:  # it would copy all weights to pad them
        seconds.pop("grouped", None)
    return situation, dict(sorted(seconds.items(), key=lambda item: item[1]))


def _pick(situation: str, seconds: dict[str, float]) -> str:
    if seconds:
        fastest = next(iter(seconds))
        clear = seconds[fastest] * _MARGIN < seconds.get("sort", float("inf"))
        return fastest if clear else "sort"
    device, dtype, _ = situation.split()
    able = [name for name in _UNMEASURED.get(device, ("sort",)) if name == "sort" or dtype in ("bfloat16", "float16")]
    return able[0]


def choose(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Choice:
    """The executor that should be fastest for these inputs, with the reasons.

    Predicted seconds = fixed + a * experts + b * multiply-adds + c * numbers moved, with the constants measured for
    this device, dtype and pass; ``turnout.run.calibrate`` measures them again on this machine.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes.
        weights: the experts.

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> choose(torch.ones(1, 3), routing, ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 2, 3))).name
    'sort'

    Source: none; a linear cost model of our own.
    """
    if invariant_here("turnout.run.choose"):
        return Choice("invariant", ("within batch_invariant no kernel is chosen by how many tokens there are",))
    if _decodes(x_TD, routing, weights):
        return Choice("sort", (f"T={routing.num_tokens} without gradients", "sort reads each chosen expert once"))
    situation, seconds = _predict(x_TD, routing, weights)
    name = _pick(situation, seconds)
    if not seconds:
        return Choice(name, (f"nothing was measured for {situation}", f"{name} is the default there"))
    shape = f"T={routing.num_tokens}, R={routing.num_entries}, E={routing.num_experts}"
    sizes = f"{shape}, D={weights.width}, F={weights.hidden}, {situation}"
    return Choice(name, (sizes, *(f"{each} would take {value * 1e3:.3g} ms" for each, value in seconds.items()), _RULE))


def execute(x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, backend: str = "auto") -> Tensor:
    """Runs the decision: each token's weighted sum of its experts' outputs.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts.
        backend: the name of an executor in ``EXECUTORS``, "auto" for the one that ``choose`` picks, or on a CUDA
            device "kernels".

    Returns:
        (T, D) in x's dtype; tokens without entries are zero.

    Raises:
        UnknownNameError: no executor of that name.
        ShapeError: the three do not fit each other.

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> weights = ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 4, 3), activation="relu")
    >>> execute(torch.ones(1, 3), routing, weights, backend="reference")
    tensor([[6., 6., 6.]])

    Source: none; a lookup by name.
    """
    if invariant_here("turnout.run.execute"):
        return invariant_experts(x_TD, routing, weights)
    if backend == "auto" and _decodes(x_TD, routing, weights):
        return sort(x_TD, routing, weights)
    name = _pick(*_predict(x_TD, routing, weights)) if backend == "auto" else backend
    executors = EXECUTORS | _ON_CUDA
    if name not in executors:
        raise nearest(name, [*executors, "auto"], kind="backend", where="turnout.run.execute")
    return executors[name](x_TD, routing, weights)
