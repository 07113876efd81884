"""Many models as one: the average of their weights."""

from collections.abc import Sequence
from typing import TypeVar

from torch import nn

from turnout.expects import MODELS, expects
from turnout.reshape.many_to_one.match import blend, combine, matched, shares
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["average"]

_WHERE = "turnout.reshape.average"


@expects(models=MODELS)
def average(models: Sequence[Model], *, weights: Sequence[float] | None = None) -> tuple[Model, Report]:
    """The weighted mean of models of one architecture, parameter by parameter.

    theta* = sum_i w_i theta_i / sum_i w_i, worked out in float64 and rounded once. Equal models give that model to
    the bit, and so does a single weight that is not 0. It makes sense for models fine-tuned from one start.

    Args:
        models: at least one, with equal names, shapes and dtypes; they are left as they are. The result is a copy of
            the first: its configuration, mode and device.
        weights: one number of at least 0 a model; None for equal ones.

    Returns:
        The mean; and the shares, the parameters, and the relative distance |theta* - theta_i| / |theta_i| to each.

    Raises:
        UsageError: names or dtypes that differ (the first is named), a weight that is negative, values not finite.
        ShapeError: shapes that differ.

    >>> a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(a.weight, 1.0), nn.init.constant_(b.weight, 4.0)
    >>> average([a, b], weights=[2, 1])[0].weight.tolist()
    [[2.0, 2.0]]

    Source: Wortsman et al., 2022, "Model soups: averaging weights of multiple fine-tuned models improves accuracy
    without increasing inference time", the uniform soup. Weights of one's own are the addition of later papers.
    """
    share = shares(weights, len(matched(models, _WHERE)), _WHERE)
    new, values, notes = blend(models, lambda _, found: combine(found, share), _WHERE)
    return new, Report("average", {"shares": share, **values}, notes)
