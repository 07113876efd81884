"""The processes that train one model together, as the loop sees them: one alone, or many that share each batch."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turnout.train import state as checkpoints
from turnout.train.balance import Whole
from turnout.types import Routing

__all__ = ["ALONE", "Alone", "Passed", "Team", "Weights"]


@dataclasses.dataclass(frozen=True)
class Weights:
    """What of a step one micro-batch's losses are.

    Args:
        aux: the weight of the load-balance loss.
        z: the weight of the z-loss.
        predicted: how many targets the step has.
        penalty: the weight of what routers ask to be minimised themselves.
        tokens: how many tokens of the step are no padding, of all processes.
        chosen_L: of each routed layer, how many tokens of the whole step chose each expert, where balance is over that.
        accumulate: how many micro-batches.
        bf16: whether forward passes are under autocast.

    Source: none; plain bookkeeping.
    """

    aux: float
    z: float
    predicted: int
    accumulate: int
    bf16: bool = False
    penalty: float = 1.0
    tokens: int = 1
    chosen_L: Sequence[Tensor] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Passed:
    """What came out of the forward and backward passes of one micro-batch.

    Args:
        losses_4: this process's part of the token loss, the load-balance loss, the z-loss and the routers' penalty, as
            the step has them.
        load_L: of each routed layer, how many tokens of all processes chose each expert, before capacity.
        scored: how many of the layers gave scores.
        logged: how many gave logits.

    Source: none; plain bookkeeping.
    """

    losses_4: Tensor
    load_L: Sequence[Tensor]
    scored: int
    logged: int


class Team(Protocol):
    """Who trains: what of a batch is this process's, how its sums become those of all, and who writes and speaks.

    Source: none; plain bookkeeping.
    """

    @property
    def first(self) -> bool:
        """Whether this process writes and speaks for all."""

    @property
    def salt(self) -> tuple[int, ...]:
        """What tells this process's random numbers from those of others."""

    def part(self, batch: Any) -> Any:
        """The rows of a batch that are this process's."""

    def wholes(self, routings: Sequence[Routing]) -> Sequence[Whole | None]:
        """Of each layer's routing, what all processes' rows together chose; None where this process has all rows."""

    def passed(
        self, id_BS: Tensor, target_BS: Tensor, real_BS: Tensor | None, weights: Weights, *, tokens: int, seed: int
    ) -> Passed | None:
        """Forward and backward passes of this process's rows, of which all have ``tokens`` that are no padding; None
        where the model is called as it is.
        """

    @property
    def schedules(self) -> bool:
        """Whether ``passed`` runs the model, and nobody else may."""

    def own(self, load_L: Sequence[Tensor]) -> Sequence[Tensor]:
        """Of all layers' loads those of the layers that this process has."""

    def measured(self, model: nn.Module, measure: Callable[[nn.Module], dict[str, Any]]) -> dict[str, Any]:
        """What is measured of the whole model, plain JSON."""

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        """What of a parameter this process updates."""

    def passing(self, *, last: bool) -> None:
        """A forward and backward pass is next; ``last`` where the optimizer steps after it."""

    def collect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Backward passes are over: puts each gradient where ``held`` is updated from."""

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm of the gradients of all processes, after ``collect``."""

    def together(self, doing: Callable[[], str]) -> contextlib.AbstractContextManager[None]:
        """Where what is done together fails because a process is gone, this says which."""

    def lead(self, action: Callable[[], Any]) -> Any:
        """What the first process gets by doing this, plain JSON, on every one."""

    def said(self, value: Any) -> list[Any]:
        """What each process says, plain JSON."""

    def heard(self, asked: str | None) -> str | None:
        """The signal that this process or another was sent."""

    def pace(self) -> Mapping[str, float]:
        """What it has to say of the steps since it was asked last, for a line of metrics.jsonl."""

    def save(
        self,
        folder: Path,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        keep: int,
    ) -> None:
        """Writes a checkpoint, as ``turnout.train.state.save``."""

    def load(
        self,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        check: Callable[[Mapping[str, Any]], None],
    ) -> dict[str, Any]:
        """Reads a checkpoint, as ``turnout.train.state.load``."""


class Alone:
    """One process, which has every row and holds every parameter whole.

    >>> Alone().first, Alone().said(3)
    (True, [3])

    Source: none; plain bookkeeping.
    """

    first = True
    schedules = False
    salt: tuple[int, ...] = ()

    def part(self, batch: Any) -> Any:
        """All of it."""
        return batch

    def wholes(self, routings: Sequence[Routing]) -> Sequence[Whole | None]:
        """Nothing: each routing is of all rows."""
        return [None] * len(routings)

    def passed(
        self, id_BS: Tensor, target_BS: Tensor, real_BS: Tensor | None, weights: Weights, *, tokens: int, seed: int
    ) -> Passed | None:
        """None: the model is called as it is."""

    def own(self, load_L: Sequence[Tensor]) -> Sequence[Tensor]:
        """All of them."""
        return load_L

    def measured(self, model: nn.Module, measure: Callable[[nn.Module], dict[str, Any]]) -> dict[str, Any]:
        """What is measured of it."""
        return measure(model)

    def total(self, tensor: Tensor) -> Tensor:
        """The tensor."""
        return tensor

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        """All of it."""
        return parameter

    def passing(self, *, last: bool) -> None:
        """Nothing."""

    def collect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing: gradients are where they belong."""

    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The norm of these gradients."""
        return torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])

    def together(self, doing: Callable[[], str]) -> contextlib.AbstractContextManager[None]:
        """Nothing."""
        return contextlib.nullcontext()

    def lead(self, action: Callable[[], Any]) -> Any:
        """What the action returns."""
        return action()

    def said(self, value: Any) -> list[Any]:
        """What this process says."""
        return [value]

    def heard(self, asked: str | None) -> str | None:
        """The signal that this process was sent."""
        return asked

    def pace(self) -> Mapping[str, float]:
        """Nothing."""
        return {}

    def save(
        self,
        folder: Path,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any],
        *,
        keep: int,
    ) -> None:
        """As ``turnout.train.state.save``."""
        checkpoints.save(folder, step, model, optimizer, state, keep=keep)

    def load(
        self,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        check: Callable[[Mapping[str, Any]], None],
    ) -> dict[str, Any]:
        """As ``turnout.train.state.load``."""
        return checkpoints.load(path, model, optimizer, check=check)


ALONE = Alone()
