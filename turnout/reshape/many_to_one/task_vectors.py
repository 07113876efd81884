"""Task arithmetic: what fine-tuning changed, added to the start or taken away from it."""

import math
from collections.abc import Sequence
from typing import TypeVar

from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.expects import MODELS, expects
from turnout.reshape.many_to_one.match import blend, matched
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["task_vectors"]

_WHERE = "turnout.reshape.task_vectors"


@expects(model=nn.Module, tuned=MODELS)
def task_vectors(
    model: Model, tuned: Sequence[Model], *, scales: float | Sequence[float] = 1.0
) -> tuple[Model, Report]:
    """The start, moved along what each fine-tuning changed.

    theta* = theta_0 + sum_i lambda_i (theta_i - theta_0), worked out in float64 and rounded once. A scale of 0 leaves
    theta_0 to the bit; a negative one takes a task away; scales of 1/n give the average of n tuned models.

    Args:
        model: theta_0, from which the others were tuned; it is left as it is.
        tuned: theta_i, at least one, with the names, shapes and dtypes of ``model``.
        scales: lambda, one for all or one each; the paper finds 0.3 to 0.5 good for sums of several tasks.

    Returns:
        A copy of ``model``, moved; and the scales, the length |tau_i| of each task vector, the cosines between them
        (near 0 where tasks do not disturb each other), and the relative distance to ``model`` and to each tuned one.

    Raises:
        UsageError: names or dtypes that differ (the first is named), or scales that are not finite or too few.
        ShapeError: shapes that differ.

    >>> start, tuned = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(start.weight, 1.0), nn.init.constant_(tuned.weight, 3.0)
    >>> task_vectors(start, [tuned], scales=-0.5)[0].weight.tolist()
    [[0.0]]

    Source: Ilharco et al., 2023, "Editing Models with Task Arithmetic". The paper's one lambda may be one a task.
    """
    found = matched([model, *tuned], _WHERE, least=2)
    scale = _scales(scales, len(tuned))

    def move(_: str, values: Sequence[Tensor]) -> Tensor:
        moved = values[0].clone()
        for factor, value in zip(scale, values[1:], strict=True):
            moved += factor * (value - values[0])
        return moved

    new, values, notes = blend([model, *tuned], move, _WHERE)
    names = [name for name, _ in model.named_parameters()]
    product = [
        [math.fsum(_product(found[0][n], a[n], b[n]) for n in names) for b in found[1:]] for a in found[1:]
    ]  # fmt: skip
    length = [math.sqrt(product[i][i]) for i in range(len(tuned))]
    cosine = [[row[j] / max(length[i] * length[j], 1e-300) for j in range(len(tuned))] for i, row in enumerate(product)]
    return new, Report("task_vectors", {"scales": scale, "lengths": length, "cosines": cosine, **values}, notes)


def _product(start: Tensor, a: Tensor, b: Tensor) -> float:
    """The inner product of two changes of one tensor."""
    start = start.double()
    return float(((a.to(start.device).double() - start) * (b.to(start.device).double() - start)).sum())


def _scales(scales: float | Sequence[float], count: int) -> list[float]:
    given = [float(scales)] * count if isinstance(scales, int | float) else [float(scale) for scale in scales]
    if len(given) == count and all(map(math.isfinite, given)):
        return given
    allowed, fix = f"be one finite number, or {count}, one a tuned model", "pass scales=0.4 for all of them"
    raise UsageError(word("scales", got=given, allowed=allowed, where=_WHERE, fix=fix))
