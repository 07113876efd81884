"""Models that can be merged: whether their tensors are of one architecture, and a copy with theirs mixed."""

import copy
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, UsageError, word
from turnout.reshape.many_to_one.same_architecture import differences, refuse_unlike

Model = TypeVar("Model", bound=nn.Module)

__all__ = [
    "Mix",
    "blend",
    "combine",
    "distance",
    "filled",
    "matched",
    "refuse_infinite",
    "rounded",
    "shares",
    "tensors",
]

Mix = Callable[[str, Sequence[Tensor]], Tensor]
_WRAPPERS = ("module.", "_orig_mod.", "base_model.model.")


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters, tied ones once, and the buffers that a state dict has."""
    kept = model.state_dict().keys()
    found: dict[str, Tensor] = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return found | {name: buffer.detach() for name, buffer in model.named_buffers() if name in kept}


def matched(models: Sequence[nn.Module], where: str, *, least: int = 1) -> list[dict[str, Tensor]]:
    """The tensors of each model, all with the names, shapes and dtypes of the first.

    Raises:
        UsageError: too few models, something that is not one, names or dtypes that differ, or configurations, modules
            or vocabularies that give equal shapes another meaning.
        ShapeError: shapes that differ.
    """
    if isinstance(models, nn.Module) and not isinstance(models, nn.ModuleList):
        models = [models]
    wrong = [model for model in models if not isinstance(model, nn.Module)]
    if wrong or len(models) < least:
        got = f"a {type(wrong[0]).__name__}" if wrong else f"{len(models)} of them"
        allowed, fix = f"be a sequence of at least {least} nn.Module", "pass [model_a, model_b]"
        raise UsageError(word("models", got=got, allowed=allowed, where=where, fix=fix))
    found = [tensors(model) for model in models]
    for index, other in enumerate(found):
        _same(found[0], other, f"model {index}", where)
    refuse_unlike(models, where)
    return found


def _same(first: Mapping[str, Tensor], other: Mapping[str, Tensor], which: str, where: str) -> None:
    """Refuses the first tensor, in the order of the first model, in which the other differs."""
    for name in (*first, *(name for name in other if name not in first)):
        if name not in other or name not in first:
            _refuse_name(name, first, other, which, where)
        a, b = first[name], other[name]
        what = f"{name!r} of {which}"
        if a.shape != b.shape:
            allowed = f"have the shape {tuple(a.shape)} that it has in model 0"
            fix = f"pass models fine-tuned from one start, or resize {name!r} to the same shape in all"
            raise ShapeError(word(what, got=str(tuple(b.shape)), allowed=allowed, where=where, fix=fix))
        if a.dtype != b.dtype:
            allowed, fix = f"have the dtype {a.dtype} that it has in model 0", f"convert {which} with .to({a.dtype})"
            raise UsageError(word(what, got=str(b.dtype), allowed=allowed, where=where, fix=fix))
        if a.is_meta or b.is_meta:
            fix = "load the weights first"
            raise UsageError(word(what, got="a meta tensor", allowed="hold values", where=where, fix=fix))


def _refuse_name(name: str, first: Mapping[str, Tensor], other: Mapping[str, Tensor], which: str, where: str) -> None:
    lacks, has = (which, "model 0") if name in first else ("model 0", which)
    names = other if name in first else first
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.5)
    fix = f"pass models of one class and configuration; {lacks} has {close[0]!r}" if close else "pass one architecture"
    for wrapper in _WRAPPERS:
        if name.startswith(wrapper) and name.removeprefix(wrapper) in names:
            fix = f"unwrap {has}: its names begin with {wrapper!r}"
        elif wrapper + name in names:
            fix = f"unwrap {lacks}: its names begin with {wrapper!r}"
    raise UsageError(word(lacks, got="none", allowed=f"have {name!r}, as {has} has", where=where, fix=fix))


def shares(weights: Sequence[float] | None, count: int, where: str) -> list[float]:
    """The weights over their sum; equal ones for None.

    Raises:
        UsageError: not one finite weight of at least 0 a model, or all zero.
    """
    if weights is None:
        return [1 / count] * count
    given = [float(weight) for weight in weights]
    if len(given) != count or not all(math.isfinite(w) and w >= 0 for w in given) or sum(given) <= 0:
        allowed = f"be {count} finite numbers of at least 0, one a model, not all 0"
        fix = "pass weights=None for equal ones; task_vectors takes negative scales"
        raise UsageError(word("weights", got=given, allowed=allowed, where=where, fix=fix))
    total = math.fsum(given)
    return [weight / total for weight in given]


def combine(values: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """sum_i c_i x_i for coefficients of sum 1, as x_a + sum_i c_i (x_i - x_a) with the largest c_a.

    So equal tensors, and a coefficient of 1, give the tensor itself to the bit.
    """
    anchor = max(range(len(values)), key=lambda i: coefficients[i])
    mixed = values[anchor].clone()
    for i, value in enumerate(values):
        if i != anchor:
            mixed += coefficients[i] * (value - values[anchor])
    return mixed


@torch.no_grad()
def blend(models: Sequence[Model], mix: Mix, where: str) -> tuple[Model, dict[str, Any], tuple[str, ...]]:
    """A copy of the first model whose tensors are ``mix(name, [x_0, x_1, ...])``, worked out in float64.

    Tensors that are equal to the bit in all models stay as they are. Buffers of whole numbers are the first model's.

    Returns:
        The model, what the report says of every merge, and notes.

    Raises:
        UsageError: the models do not match, or a tensor is not finite before or after.
    """
    found = matched(models, where)
    mixed, notes, kept = dict[str, Tensor](), differences(models), 0
    parameters = {name for name, _ in models[0].named_parameters()}
    for name, first in found[0].items():
        values = [each[name].to(first.device) for each in found]
        if all(torch.equal(value, first) for value in values):
            mixed[name], kept = first, kept + 1
        elif first.is_floating_point():
            for index, value in enumerate(values):
                refuse_infinite(f"{name!r} of model {index}", value, where)
            mixed[name] = rounded(name, mix(name, [value.double() for value in values]), first.dtype, where)
        elif name in parameters:
            allowed, fix = "be floating point to be merged", "dequantize the models first"
            raise UsageError(word(f"{name!r}", got=str(first.dtype), allowed=allowed, where=where, fix=fix))
        else:
            mixed[name] = first
            notes.append(f"{name} differs between the models and is the first one's: {first.dtype} is not merged")
        if name not in parameters and mixed[name] is not first:
            notes.append(f"the buffer {name} is merged as parameters are")
    new = filled(models[0], mixed)
    count = sum(parameter.numel() for parameter in new.parameters())
    values = {
        "models": len(models),
        "params_before": count,
        "params_after": count,
        "equal_tensors": kept,
        "merged_tensors": len(mixed) - kept,
        "relative_distances": [distance(new, model) for model in models],
    }
    return new, values, tuple(notes)


def refuse_infinite(what: str, value: Tensor, where: str) -> None:
    """Refuses weights that no mean can hold.

    Raises:
        UsageError: a value is inf or nan.
    """
    if not value.isfinite().all():
        fix = "look for the step at which its training diverged"
        raise UsageError(word(what, got="inf or nan", allowed="be finite", where=where, fix=fix))


def rounded(name: str, value: Tensor, dtype: torch.dtype, where: str) -> Tensor:
    """The merged tensor in the dtype of the models.

    Raises:
        UsageError: it does not fit.
    """
    result = value.to(dtype)
    if not result.isfinite().all():
        fix = "use smaller scales, or convert the models to float32"
        raise UsageError(word(f"the merged {name!r}", got="inf", allowed=f"fit {dtype}", where=where, fix=fix))
    return result


@torch.no_grad()
def filled(model: Model, mixed: Mapping[str, Tensor]) -> Model:
    """A copy of the model with these tensors, without gradients."""
    new = copy.deepcopy(model)
    for name, tensor in tensors(new).items():
        tensor.copy_(mixed[name])
    for parameter in new.parameters():
        parameter.grad = None
    return new


@torch.no_grad()
def distance(merged: nn.Module, other: nn.Module) -> float:
    """|theta* - theta_i| / |theta_i| over the parameters."""
    pairs = list(zip(merged.parameters(), other.parameters(), strict=True))
    gap = math.fsum(float((a.double() - b.to(a.device).double()).square().sum()) for a, b in pairs)
    size = math.fsum(float(b.double().square().sum()) for _, b in pairs)
    return math.sqrt(gap) / max(math.sqrt(size), 1e-300)
