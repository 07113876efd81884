"""Sharpness: how much the loss can rise when the weights move a little, all of them or one layer's alone."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, nearest, word
from turnout.expects import CALLED, expects
from turnout.types import Report

__all__ = ["layers_of", "sharpness"]

_WHERE = "turnout.measure.sharpness"

Loss = Callable[[nn.Module], Tensor]


@expects(model=nn.Module)
def layers_of(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Layer -> the names of its parameters: a module with parameters of its own is a layer, tied ones count once.

    A parameter that the model itself holds is a layer of its own.

    >>> layers_of(nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1)))
    {'0': ('0.weight', '0.bias'), '2': ('2.weight', '2.bias')}

    Source: none; plain bookkeeping.
    """
    found: dict[str, tuple[str, ...]] = {}
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.numel():
            layer = name.rpartition(".")[0] or name
            found[layer] = (*found.get(layer, ()), name)
    return found


@expects(model=nn.Module, loss=CALLED)
def sharpness(
    model: nn.Module, loss: Loss, *, radius: float = 0.01, steps: int = 3, layers: Sequence[str] | None = None
) -> Report:
    """The worst rise of the loss near the weights, for the whole model and for each layer alone.

    S_l = max over |d_i| <= radius |theta_i| for i in layer l, d_i = 0 elsewhere, of L(theta + d) - L(theta): a change
    is measured against the weight that it changes, so that scaling one layer up and the next one down changes nothing.
    The maximum is looked for by ascent along signs of the gradient from d = 0, in steps of radius |theta| that halve,
    cut to the box; what is found is never below 0, and never above the true maximum.

    Args:
        model: left as it is; it is put in evaluation mode meanwhile.
        loss: takes the model, gives a scalar with gradients; the same every time, so the same data.
        radius: rho, how far a weight may move, as a share of itself.
        steps: of ascent, for each layer and for the whole; each takes one loss and one gradient.
        layers: names that ``layers_of`` gives; None for all.

    Returns:
        ``loss``, ``sharpness`` of the whole model, and ``by_layer``.

    Raises:
        UsageError: a radius or number of steps that is not positive, no such layer, or a loss that is not finite.

    >>> one = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(one.weight, 2.0)
    >>> report = sharpness(one, lambda m: (m.weight**2).sum(), radius=0.1)
    >>> round(report["sharpness"], 4), {k: round(v, 4) for k, v in report["by_layer"].items()}  # 2.2**2 - 2**2
    (0.84, {'weight': 0.84})

    Source: Andriushchenko et al., 2023, "A modern look at the relationship between sharpness and generalization":
    adaptive worst-case sharpness in the maximum norm, without their normalisation of logits; a few plain steps stand
    for their 20 of Auto-PGD. Layer by layer is the idea of Abdollahpoorrostam, 2024, "In Search of the Successful
    Interpolation", whose code is not published: the definition is ours.
    """
    if not radius > 0 or steps < 1:
        got, fix = f"{radius} and {steps}", "pass radius=0.01, steps=3"
        raise UsageError(word("radius and steps", got=got, allowed="be positive", where=_WHERE, fix=fix))
    known = layers_of(model)
    unknown = [layer for layer in layers or () if layer not in known]
    if unknown:
        raise nearest(unknown[0], known, kind="layer", where=_WHERE)
    parameters = dict(model.named_parameters())
    with _ready(model, [parameters[name] for names in known.values() for name in names]):
        start = float(_finite(loss(model)).detach())
        every = [parameters[name] for names in known.values() for name in names]
        found = {
            layer: _rise(model, loss, [parameters[name] for name in known[layer]], start, radius, steps)
            for layer in (known if layers is None else layers)
        }
        whole = _rise(model, loss, every, start, radius, steps)
    values = {"loss": start, "sharpness": whole, "by_layer": found, "radius": radius, "steps": steps}
    return Report("sharpness", values)


def _rise(model: nn.Module, loss: Loss, moved: list[nn.Parameter], start: float, radius: float, steps: int) -> float:
    """The largest rise of the loss that a few steps of ascent find; the weights are put back."""
    home = [parameter.detach().clone() for parameter in moved]
    box = [radius * weight.abs() for weight in home]
    top = 0.0
    try:
        for step in range(steps):
            slopes = torch.autograd.grad(_finite(loss(model)), moved, allow_unused=True)
            with torch.no_grad():
                for parameter, slope, weight, room in zip(moved, slopes, home, box, strict=True):
                    if slope is not None:
                        parameter.add_(slope.sign() * room, alpha=0.5**step)
                        parameter.copy_(torch.minimum(torch.maximum(parameter, weight - room), weight + room))
                top = max(top, float(_finite(loss(model)).detach()) - start)
    finally:
        with torch.no_grad():
            for parameter, weight in zip(moved, home, strict=True):
                parameter.copy_(weight)
    return top


@contextlib.contextmanager
def _ready(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Evaluation mode and gradients for all; everything as before at the end."""
    modes: Mapping[nn.Module, bool] = {module: module.training for module in model.modules()}
    frozen = [parameter for parameter in parameters if not parameter.requires_grad]
    try:
        model.eval()
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, training in modes.items():
            module.training = training


def _finite(value: Tensor) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not math.isfinite(float(value.detach())):
        got = f"{value.tolist()}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        fix = "return the mean loss of the batch, a tensor"
        raise UsageError(word("the loss", got=got, allowed="be one finite number", where=_WHERE, fix=fix))
    return value
