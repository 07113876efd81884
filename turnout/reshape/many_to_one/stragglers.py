"""Straggler layers: those whose sharpness stands out between two models, and interpolation that thins their update."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, nearest, word
from turnout.expects import CALLED, expects
from turnout.measure import layers_of, sharpness
from turnout.reshape.many_to_one.interpolate import interpolate
from turnout.reshape.many_to_one.match import blend, combine, matched, tensors
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["interpolate_sparse", "stragglers"]

_WHERE = "turnout.reshape.stragglers"

Loss = Callable[[nn.Module], Tensor]


@expects(first=nn.Module, second=nn.Module, loss=CALLED)
def stragglers(
    first: nn.Module,
    second: nn.Module,
    loss: Loss,
    *,
    positions: Sequence[float] = (0.25, 0.5, 0.75),
    factor: float = 2.0,
    radius: float = 0.02,
    steps: int = 3,
) -> Report:
    """The layers whose sharpness, on the mean between two models, is over ``factor`` times the median layer's.

    Args:
        first: the model before fine-tuning.
        second: the model after, of equal names, shapes and dtypes.
        loss: takes a model, gives a scalar with gradients, on data of the fine-tuning; the same every time.
        positions: where on the line, 0 for the first and 1 for the second.
        factor: how much sharper, at least 1.
        radius: of ``sharpness``, as ``steps``.
        steps: of ``sharpness``.

    Returns:
        ``stragglers``, sharpest first; ``by_layer``, the means; and of each position the loss, and sharpness.

    Raises:
        UsageError: a position outside [0, 1], a factor under 1, models that do not match, or a loss that is not finite.
        ShapeError: shapes that differ.

    >>> a, b = (nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(2))
    >>> for model in (a, b):
    ...     for size, layer in zip((1.0, 1.0, 3.0), model, strict=True):
    ...         _ = nn.init.constant_(layer.weight, size), nn.init.zeros_(layer.bias)
    >>> sum_of_squares = lambda m: sum((p**2).sum() for p in m.parameters())
    >>> stragglers(a, b, sum_of_squares)["stragglers"]
    ['2']

    Source: Abdollahpoorrostam, 2024, "In Search of the Successful Interpolation: On the Role of Sharpness in CLIP
    Generalization", the idea. No code is published: sharpness by layer, and what makes a straggler, are ours.
    """
    matched([first, second], _WHERE)
    if not factor >= 1 or not positions:
        got, fix = f"{factor} and {list(positions)}", "pass factor=2.0, positions=(0.25, 0.5, 0.75)"
        allowed = "be at least 1, and at least one position"
        raise UsageError(word("factor and positions", got=got, allowed=allowed, where=_WHERE, fix=fix))
    on_line = (interpolate(first, second, position=position)[0] for position in positions)
    found: list[dict[str, Any]] = [dict(sharpness(m, loss, radius=radius, steps=steps).values) for m in on_line]
    by_layer = {layer: statistics.fmean(report["by_layer"][layer] for report in found) for layer in layers_of(first)}
    limit = factor * statistics.median(by_layer.values())
    out = sorted((layer for layer, value in by_layer.items() if value > limit), key=lambda layer: -by_layer[layer])
    values = {
        "stragglers": out,
        "by_layer": by_layer,
        "limit": limit,
        "positions": list(positions),
        "losses": [report["loss"] for report in found],
        "sharpness": [report["sharpness"] for report in found],
        "by_layer_at": [dict(report["by_layer"]) for report in found],
    }
    return Report("stragglers", values, () if out else (f"no layer is {factor:g} times as sharp as the median one",))


@expects(first=nn.Module, second=nn.Module)
def interpolate_sparse(
    first: Model, second: Model, layers: Sequence[str], *, position: float = 0.5, keep: float = 0.2
) -> tuple[Model, Report]:
    """The model at ``position`` on the line between two, the update of some layers thinned first.

    theta(alpha) = theta_0 + alpha (theta_1 - theta_0); of the layers named, only the ``keep`` share of the entries of
    theta_1 - theta_0 that are largest in size counts, each layer by itself, and the others are 0.

    Args:
        first: theta_0; it is left as it is.
        second: theta_1, of equal names, shapes and dtypes.
        layers: names of layers, as ``stragglers`` gives them; none is plain interpolation.
        position: alpha, in [0, 1].
        keep: share of the entries that stay, in [0, 1].

    Returns:
        A copy of ``first`` at that position; and how many entries of the update were left out, and the distances.

    Raises:
        UsageError: no such layer, a number out of range, or models that do not match.
        ShapeError: shapes that differ.

    >>> a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> _ = a.weight.data.zero_(), b.weight.data.copy_(torch.tensor([[1.0, -3.0]]))
    >>> interpolate_sparse(a, b, ["weight"], keep=0.5)[0].weight.tolist()
    [[0.0, -1.5]]

    Source: Abdollahpoorrostam, 2024, "In Search of the Successful Interpolation: On the Role of Sharpness in CLIP
    Generalization", sparsity in the straggler layers. How it is brought about is not published; thinning the update by
    size is ours, and leaves what both models share alone.
    """
    known = layers_of(first)
    unknown = [layer for layer in layers if layer not in known]
    if unknown:
        raise nearest(unknown[0], known, kind="layer", where="turnout.reshape.interpolate_sparse")
    if not 0 <= position <= 1 or not 0 <= keep <= 1:
        allowed, fix = "be in [0, 1]", "pass position=0.5, keep=0.2"
        got = f"{position} and {keep}"
        raise UsageError(word("position and keep", got=got, allowed=allowed, where=_WHERE, fix=fix))
    matched([first, second], _WHERE)
    stays = {name: mask for layer in layers for name, mask in _largest(first, second, known[layer], keep).items()}

    def mix(name: str, pair: Sequence[Tensor]) -> Tensor:
        moved = pair[1] if name not in stays else torch.where(stays[name], pair[1], pair[0])
        return combine([pair[0], moved], (1 - position, position))

    new, values, notes = blend([first, second], mix, _WHERE)
    out = sum(int((~mask).sum()) for mask in stays.values())
    done = {"position": position, "layers": list(layers), "keep": keep, "entries_left_out": out}
    return new, Report("interpolate_sparse", {**done, **values}, notes)


def _largest(first: nn.Module, second: nn.Module, names: Sequence[str], keep: float) -> dict[str, Tensor]:
    """Which entries of the update of one layer's parameters stay; of equal ones the earlier."""
    old, new = tensors(first), tensors(second)
    sizes = [(new[name].to(old[name].device).double() - old[name].double()).abs() for name in names]
    flat_N = torch.cat([size.flatten() for size in sizes])
    order_N = flat_N.sort(descending=True, stable=True)[1][: math.ceil(keep * len(flat_N))]
    stays_N = torch.zeros(len(flat_N), dtype=torch.bool, device=flat_N.device).index_fill(0, order_N, True)
    pieces = stays_N.split([size.numel() for size in sizes])
    return {name: piece.view_as(size) for name, piece, size in zip(names, pieces, sizes, strict=True)}
