"""Which executor runs, and why."""

import dataclasses

import torch
from torch import Tensor

from turnout.errors import nearest
from turnout.run.grouped import grouped
from turnout.run.reference import Executor, reference
from turnout.run.sort import sort
from turnout.types import ExpertWeights, Routing

__all__ = ["EXECUTORS", "Choice", "choose", "execute"]

EXECUTORS: dict[str, Executor] = {
    "reference": reference,
    "sort": sort,
    "grouped": grouped,
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """The name of an executor, and the reasons for it.

    >>> Choice("sort", ("the device is a CPU",)).name
    'sort'

    Source: none; plain bookkeeping.
    """

    name: str
    reasons: tuple[str, ...]


def choose(x_TD: Tensor, routing: Routing, weights: ExpertWeights) -> Choice:
    """The executor that should be fastest for these inputs, with the reasons.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes.
        weights: the experts.

    >>> import torch
    >>> routing = Routing.from_topk(torch.tensor([[1]]), torch.tensor([[0.5]]), num_experts=2)
    >>> choose(torch.ones(1, 3), routing, ExpertWeights(torch.ones(2, 3, 4), torch.ones(2, 2, 3))).name
    'sort'

    Source: none; a small cost model of our own.
    """
    if x_TD.device.type == "cpu":
        return Choice("sort", ("the device is a CPU",))
    if x_TD.dtype in (torch.bfloat16, torch.float16):
        return Choice("grouped", (f"the device is {x_TD.device.type} and the dtype is {x_TD.dtype}",))
    return Choice("sort", (f"torch's grouped product does not take {x_TD.dtype} on {x_TD.device.type}",))


def execute(x_TD: Tensor, routing: Routing, weights: ExpertWeights, *, backend: str = "auto") -> Tensor:
    """Runs the decision: each token's weighted sum of its experts' outputs.

    Args:
        x_TD: (T, D), the tokens.
        routing: which experts each takes, and with what weight.
        weights: the experts.
        backend: the name of an executor in ``EXECUTORS``, or "auto" to let ``choose`` pick.

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
    name = choose(x_TD, routing, weights).name if backend == "auto" else backend
    if name not in EXECUTORS:
        raise nearest(name, [*EXECUTORS, "auto"], kind="backend", where="turnout.run.execute")
    return EXECUTORS[name](x_TD, routing, weights)
