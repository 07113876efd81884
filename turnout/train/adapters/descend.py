"""Gradient descent on a few parameters of a model that exists, one step a batch; everything else stays as it is."""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import TrainingError, UsageError, word
from turnout.layers import given

Loss = Callable[[nn.Module, Any], Tensor]


def descend(
    model: nn.Module,
    rates: Iterable[tuple[Iterable[nn.Module], float]],
    batches: Iterable[Any],
    *,
    loss: Loss | None,
    clip: float,
    where: str,
) -> tuple[float, ...]:
    """The loss of each step of Adam on the parameters of these modules, each group at its own rate.

    Raises:
        UsageError: batches that need a ``loss``.
        TrainingError: the loss is not a number; the step is not taken.
    """
    groups = [{"params": unique(modules), "lr": rate} for modules, rate in rates]
    chosen = [parameter for group in groups for parameter in group["params"]]
    losses: list[float] = []
    with _alone(model, chosen):
        optimizer = torch.optim.Adam(groups)
        for batch in batches:
            value = _loss(model, batch, where) if loss is None else loss(model, batch)
            losses.append(value.item())
            if not math.isfinite(losses[-1]):
                got, fix = f"{losses[-1]} at step {len(losses)}", f"pass a rate below {groups[-1]['lr']}"
                raise TrainingError(word("the loss", got=got, allowed="be finite", where=where, fix=fix))
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(chosen, clip)
            optimizer.step()
        optimizer.zero_grad()
    return tuple(losses)


def unique(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """The parameters of these modules, each once."""
    chosen = [parameter for module in modules for parameter in module.parameters()]
    return list({id(parameter): parameter for parameter in chosen}.values())


@contextlib.contextmanager
def _alone(model: nn.Module, chosen: list[nn.Parameter]) -> Iterator[None]:
    """While this is open, these parameters alone are trained; then gradients and modes are as they were."""
    asked = {parameter: parameter.requires_grad for parameter in model.parameters()}
    modes = {module: module.training for module in model.modules()}
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        model.train()
        yield
    finally:
        for parameter, wanted in asked.items():
            parameter.requires_grad_(wanted)
        for module, mode in modes.items():
            module.training = mode


def _loss(model: nn.Module, batch: Any, where: str) -> Tensor:
    found = None
    if isinstance(batch, Mapping):
        said = {key: batch[key] for key in ("task_B", "query_BQ") if key in batch}
        with given(**said):
            found = model(**{key: value for key, value in batch.items() if key not in said}).loss
    if not isinstance(found, Tensor):
        got, fix = type(batch).__name__, "pass batches with labels, or a loss of your own"
        raise UsageError(word("the batch", got=got, allowed="give model(**batch).loss", where=where, fix=fix))
    return found
