"""The straight line between two models: one point of it, or the best one of many."""

import math
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import nn

from turnout.errors import UsageError, word
from turnout.expects import CALLED, expects
from turnout.reshape.calibrate import evaluating
from turnout.reshape.many_to_one.match import blend, combine, matched
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["interpolate", "interpolation_path"]

_WHERE = "turnout.reshape.interpolate"


@expects(first=nn.Module, second=nn.Module)
def interpolate(first: Model, second: Model, *, position: float = 0.5) -> tuple[Model, Report]:
    """The model at ``position`` on the straight line from the first model to the second.

    theta(alpha) = (1 - alpha) theta_0 + alpha theta_1, worked out in float64 and rounded once; 0 and 1 give the models
    themselves to the bit. With a zero-shot and a fine-tuned model this is robust fine-tuning (WiSE-FT).

    Args:
        first: theta_0; it is left as it is.
        second: theta_1, of equal names, shapes and dtypes.
        position: alpha, in [0, 1]; beyond it, use ``task_vectors``.

    Returns:
        A copy of ``first`` at that position; and the position and the relative distance to both.

    Raises:
        UsageError: a position outside [0, 1], or names or dtypes that differ (the first is named).
        ShapeError: shapes that differ.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(a.weight, 1.0), nn.init.constant_(b.weight, 3.0)
    >>> interpolate(a, b, position=0.25)[0].weight.tolist()
    [[1.5]]

    Source: Abdollahpoorrostam, 2024, "In Search of the Successful Interpolation: On the Role of Sharpness in CLIP
    Generalization", the interpolation (of Wortsman et al., 2022, "Robust fine-tuning of zero-shot models"). For its
    straggler layers see ``stragglers``.
    """
    alpha = _positions([position])[0]
    new, values, notes = blend([first, second], lambda _, pair: combine(pair, (1 - alpha, alpha)), _WHERE)
    return new, Report("interpolate", {"position": alpha, **values}, notes)


@expects(first=nn.Module, second=nn.Module, loss=CALLED)
def interpolation_path(
    first: Model,
    second: Model,
    loss: Callable[[Model], float],
    *,
    positions: int | Sequence[float] = 11,
) -> tuple[Model, Report]:
    """The model with the lowest loss on the straight line between two, and the losses all along it.

    The barrier is max over alpha of L(theta(alpha)) - ((1 - alpha) L(theta_0) + alpha L(theta_1)): what the line loses
    against the straight line between the ends' losses. 0 or below at every point: the two are linearly connected.

    Args:
        first: theta_0; it is left as it is.
        second: theta_1, of equal names, shapes and dtypes.
        loss: takes a model, in evaluation mode, and gives its loss; held-out data, or the best point is overfitted.
        positions: how many, evenly from 0 to 1, at least 2; or which, in [0, 1].

    Returns:
        The best model (of equal ones, the nearest to the first); and all losses, the barrier and where it is.

    Raises:
        UsageError: a position outside [0, 1], a loss that is nan, or models that do not match.
        ShapeError: shapes that differ.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(a.weight, 0.0), nn.init.constant_(b.weight, 4.0)
    >>> best, report = interpolation_path(a, b, lambda m: float((m.weight - 1) ** 2), positions=5)
    >>> report["best_position"], report["losses"], report["barrier"]
    (0.25, [1.0, 0.0, 1.0, 4.0, 9.0], 0.0)

    Source: Frankle et al., 2020, "Linear Mode Connectivity and the Lottery Ticket Hypothesis", the barrier; with the
    line of Abdollahpoorrostam, 2024, "In Search of the Successful Interpolation". Frankle et al. take the mean of the
    ends' losses, not the line between.
    """
    matched([first, second], _WHERE)
    if isinstance(positions, int):
        if positions < 2:
            fix = "pass positions=11"
            raise UsageError(word("positions", got=positions, allowed="be at least 2", where=_WHERE, fix=fix))
        positions = [index / (positions - 1) for index in range(positions)]
    alphas = _positions(positions)
    losses = [_loss(first, second, alpha, loss) for alpha in alphas]
    ends = [losses[alphas.index(a)] if a in alphas else _loss(first, second, a, loss) for a in (0.0, 1.0)]
    above = [value - ((1 - a) * ends[0] + a * ends[1]) for a, value in zip(alphas, losses, strict=True)]
    best = min(range(len(alphas)), key=lambda index: (losses[index], alphas[index]))
    top = max(range(len(alphas)), key=lambda index: above[index])
    new, report = interpolate(first, second, position=alphas[best])
    values = {
        "positions": alphas,
        "losses": losses,
        "loss_first": ends[0],
        "loss_second": ends[1],
        "best_position": alphas[best],
        "best_loss": losses[best],
        "barrier": max(0.0, above[top]),
        "barrier_position": alphas[top],
    }
    return new, Report("interpolation_path", values | dict(report.values), report.notes)


def _loss(first: Model, second: Model, alpha: float, loss: Callable[[Model], float]) -> float:
    model = interpolate(first, second, position=alpha)[0]
    with evaluating(model), torch.no_grad():
        value = float(loss(model))
    if math.isnan(value):
        allowed, fix = "be a number everywhere on the line", "look at both models' own losses"
        raise UsageError(word(f"the loss at {alpha:g}", got="nan", allowed=allowed, where=_WHERE, fix=fix))
    return value


def _positions(given: Sequence[float]) -> list[float]:
    found = [float(position) for position in given]
    if found and all(0 <= position <= 1 for position in found):
        return found
    wrong = next((position for position in found if not 0 <= position <= 1), None)
    got = "none" if wrong is None else wrong
    fix = "pass position=0.5; to go beyond the ends, use task_vectors(first, [second], scales=...)"
    raise UsageError(word("position", got=got, allowed="be in [0, 1]", where=_WHERE, fix=fix))
