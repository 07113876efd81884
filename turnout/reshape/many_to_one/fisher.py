"""Fisher merging: each weight is averaged by how much each model's predictions depend on it."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from turnout.errors import DataError, ShapeError, UsageError, nearest, word
from turnout.expects import MODELS, expects
from turnout.reshape.calibrate import evaluating
from turnout.reshape.many_to_one.match import Mix, blend, combine, matched, refuse_infinite, shares
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["fisher", "fisher_information"]

_WHERE = "turnout.reshape.fisher"
_MOST_LABELS = 4096  # one backward pass each and example: beyond, only sampling ends
Information = Mapping[str, Tensor]


@expects(models=MODELS)
def fisher(
    models: Sequence[Model],
    information: Sequence[Information],
    *,
    weights: Sequence[float] | None = None,
    floor: float = 1e-6,
    normalize: bool = False,
) -> tuple[Model, Report]:
    """The models as one, each weight averaged in proportion to its Fisher information in each model.

    theta* = sum_i lambda_i F_i theta_i / sum_i lambda_i F_i, elementwise: the most likely weights when each
    posterior is a Gaussian of precision F_i. Equal F give the plain average; for quadratic losses whose Hessians are
    diagonal, with F_i = H_i, it is the minimiser of their weighted sum.

    Args:
        models: at least one, with equal names, shapes and dtypes, fine-tuned from one start.
        information: F_i >= 0 of each, name -> tensor of the parameter's shape, as ``fisher_information`` gives.
        weights: lambda_i >= 0; None for equal ones. The paper picks them on validation data.
        floor: F_i is at least this share of the mean of F_i, so that what no model's data touches is averaged plainly.
            0 for none; where all lambda_i F_i are 0, the average by lambda is taken.
        normalize: divides each F_i by its norm over all parameters first, as the paper's code does, so that no model
            rules because its losses are steeper.

    Returns:
        The merged model, a copy of the first; and the shares, each model's mean F before the floor, the share of its
        entries that the floor raised, its share of the coefficients, and the relative distance to each. Buffers, which
        have no information, are averaged by lambda.

    Raises:
        UsageError: information that is missing, negative or not finite, or models that do not match.
        ShapeError: shapes that differ.

    >>> a, b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.constant_(a.weight, 0.0), nn.init.constant_(b.weight, 4.0)
    >>> steep = [{"weight": torch.tensor([[3.0, 1.0]])}, {"weight": torch.tensor([[1.0, 1.0]])}]
    >>> fisher([a, b], steep)[0].weight.tolist()
    [[1.0, 2.0]]

    Source: Matena and Raffel, 2022, "Merging Models with Fisher-Weighted Averaging". Their code floors the information
    of the target model alone, absolutely; ours floors every model's, relative to its mean, and normalises on request.
    """
    matched(models, _WHERE)
    share = shares(weights, len(models), _WHERE)
    if not (math.isfinite(floor) and floor >= 0):
        raise UsageError(word("floor", got=floor, allowed="be at least 0", where=_WHERE, fix="pass floor=1e-6"))
    found = [_checked(each, model, index) for index, (each, model) in enumerate(_pairs(information, models))]
    if normalize:
        found = [_normalized(each) for each in found]
    least = [floor * _mean(each) for each in found]
    taken = [0.0] * len(models)
    new, values, notes = blend(models, _mix(found, share, least, taken), _WHERE)
    about = {
        "shares": share,
        "mean_information": [_mean(each) for each in found],
        "floored_share": [_below(each, value) for each, value in zip(found, least, strict=True)],
        "coefficient_shares": [part / max(math.fsum(taken), 1e-300) for part in taken],
    }
    empty = (f"model {index} has no information at all" for index, each in enumerate(found) if _mean(each) == 0)
    return new, Report("fisher", about | values, (*notes, *empty))


@expects(model=nn.Module)
def fisher_information(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int | None = None,
    logits: Callable[[nn.Module, Any], Tensor] | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of a model that gives a distribution over V labels.

    F = E_x E_{y ~ p(y|x)} (d log p(y|x) / d theta)^2, elementwise: gradients are taken one example at a time and
    squared before they are averaged, and y comes from the model itself, not from the data. Every position
    of a sequence is an example, given what stands before it, but for what an ``attention_mask`` calls padding. Frozen
    parameters have none: 0.

    Args:
        model: run in evaluation mode, each item of a batch alone; it is left as it is, gradients included.
        batches: what the model takes: tensors (B, ...), or tuples or mappings of such; a few hundred examples do.
        samples: None takes the expectation over all V labels exactly, at V backward passes an example (V at most
            4,096); a number takes as many draws from p(y|x), which is right on average.
        logits: (model, batch) -> (..., V) scores; None for the model's output, its ``logits_BSV`` or ``logits``.
        seed: of the draws.

    Returns:
        Name -> F in float64, of the parameter's shape, averaged over examples; not floored, not normalised.

    Raises:
        DataError: no example.
        UsageError: too many labels to take all, samples below 1, or an output without logits.

    >>> model = nn.Linear(1, 2, bias=False)
    >>> _ = nn.init.zeros_(model.weight)  # p = 1/2, 1/2: the gradient is +-x/2 whichever label
    >>> fisher_information(model, [torch.tensor([[2.0], [4.0]])])["weight"].flatten().tolist()
    [2.5, 2.5]

    Source: Matena and Raffel, 2022, "Merging Models with Fisher-Weighted Averaging". Positions of sequences as
    examples are ours; labels are sampled on request only.
    """
    if samples is not None and samples < 1:
        fix = "pass samples=1, or None for all labels"
        raise UsageError(word("samples", got=samples, allowed="be at least 1", where=_WHERE, fix=fix))
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = {name: torch.zeros_like(parameter, dtype=torch.float64) for name, parameter in model.named_parameters()}
    several = (batches,) if isinstance(batches, Tensor) else batches
    generator, count = torch.Generator().manual_seed(seed), 0
    with evaluating(model), torch.enable_grad():
        for example in (item for batch in several for item in _items(batch)):
            for log_V in _log_probabilities(model, example, logits):
                _refuse_many(len(log_V), samples)
                _add(total, named, log_V, _labels(log_V.detach(), samples, generator))
                count += 1
    if not count:
        fix = "pass at least one batch; an iterator is empty the second time"
        raise DataError(word("batches", got="no example", allowed="have examples", where=_WHERE, fix=fix))
    return {name: value / count for name, value in total.items()}


def _add(
    total: dict[str, Tensor], named: Mapping[str, Tensor], log_V: Tensor, labels: Iterable[tuple[float, int]]
) -> None:
    """Adds one example's squared gradients, label by label."""
    for share, label in labels:
        slopes = torch.autograd.grad(log_V[label], list(named.values()), retain_graph=True, allow_unused=True)
        for name, slope in zip(named, slopes, strict=True):
            if slope is not None:
                total[name] += share * slope.double().square()


def _labels(log_V: Tensor, samples: int | None, generator: torch.Generator) -> Iterator[tuple[float, int]]:
    """Labels with their shares of the expectation: all of them, or draws."""
    share_V = log_V.exp().cpu()
    if samples is None:
        yield from ((share, label) for label, share in enumerate(share_V.tolist()) if share > 0)
    else:
        drawn = torch.multinomial(share_V, samples, replacement=True, generator=generator)
        yield from ((1 / samples, label) for label in drawn.tolist())


def _items(batch: Any) -> Iterator[Any]:
    """The items of a batch, each as a batch of one."""
    columns = list(batch.values()) if isinstance(batch, Mapping) else batch
    columns = list(columns) if isinstance(columns, tuple | list) else [columns]
    if not columns or not all(isinstance(column, Tensor) and column.ndim for column in columns):
        kinds = ", ".join(type(column).__name__ for column in columns) or "empty"
        allowed, fix = "be a tensor (B, ...), or a tuple or mapping of such", "pass [x_BD, ...], a list of batches"
        raise UsageError(word("a batch", got=kinds, allowed=allowed, where=_WHERE, fix=fix))
    sizes = [len(column) for column in columns]
    if len(set(sizes)) > 1:
        fix = "pass what is the same for all items through logits=lambda model, batch: ..."
        raise ShapeError(word("the tensors of a batch", got=sizes, allowed="be of one size B", where=_WHERE, fix=fix))
    for row in zip(*(column.split(1) for column in columns), strict=True):
        if isinstance(batch, Mapping):
            yield dict(zip(batch, row, strict=True))
        else:
            yield row[0] if isinstance(batch, Tensor) else row


def _log_probabilities(model: nn.Module, example: Any, logits: Callable[[nn.Module, Any], Tensor] | None) -> Tensor:
    """(N, V) in float64, at each position of one item."""
    if logits is not None:
        output = logits(model, example)
    elif isinstance(example, Mapping):
        output = model(**example)
    else:
        output = model(*example) if isinstance(example, tuple) else model(example)
    for name in ("logits_BSV", "logits"):
        output = getattr(output, name, output)
    if not isinstance(output, Tensor) or output.ndim < 1:
        fix = "pass logits=lambda model, batch: ..., which gives them"
        got = f"a {type(output).__name__}"
        raise UsageError(word("the model's output", got=got, allowed="be logits (..., V)", where=_WHERE, fix=fix))
    score_NV = output.flatten(0, -2) if output.ndim > 1 else output[None]
    mask = example.get("attention_mask") if isinstance(example, Mapping) else None
    if mask is not None and mask.numel() == len(score_NV):
        score_NV = score_NV[mask.flatten().bool()]  # padding is no example
    return score_NV.double().log_softmax(-1)


def _refuse_many(labels: int, samples: int | None) -> None:
    if samples is None and labels > _MOST_LABELS:
        allowed, fix = f"be sampled beyond {_MOST_LABELS} of them", "pass samples=4"
        raise UsageError(word("labels", got=f"{labels}, all", allowed=allowed, where=_WHERE, fix=fix))


def _pairs(information: Sequence[Information], models: Sequence[nn.Module]) -> list[tuple[Information, nn.Module]]:
    if isinstance(information, Mapping) or len(information) != len(models):
        got = "one mapping" if isinstance(information, Mapping) else f"{len(information)} for {len(models)} models"
        fix = "pass [fisher_information(m, batches) for m in models]"
        raise UsageError(word("information", got=got, allowed="be one mapping a model", where=_WHERE, fix=fix))
    return list(zip(information, models, strict=True))


def _checked(information: Information, model: nn.Module, index: int) -> Information:
    """The information of every parameter of the model, in float64."""
    found = dict[str, Tensor]()
    for name, parameter in model.named_parameters():
        what = f"information of {name!r} in model {index}"
        if name not in information:
            raise nearest(name, information, kind="parameter", where=f"the information of model {index}")
        value = information[name]
        if value.shape != parameter.shape:
            fix = "compute it for this very model"
            allowed = f"have its shape {tuple(parameter.shape)}"
            raise ShapeError(word(what, got=str(tuple(value.shape)), allowed=allowed, where=_WHERE, fix=fix))
        refuse_infinite(what, value, _WHERE)
        if (value < 0).any():
            fix = "pass squares of gradients, or a positive curvature"
            raise UsageError(word(what, got=float(value.min()), allowed="be at least 0", where=_WHERE, fix=fix))
        found[name] = value.detach().double()
    return found


def _mix(found: Sequence[Information], share: Sequence[float], least: Sequence[float], taken: list[float]) -> Mix:
    """x_0 + sum_i c_i (x_i - x_0), c = the precisions over their sum, or the shares where that is 0.

    ``taken`` sums up the coefficients of each model.
    """

    def mix(name: str, values: Sequence[Tensor]) -> Tensor:
        if name not in found[0]:
            return combine(values, share)
        floored = [each[name].to(values[0].device).clamp_min(low) for each, low in zip(found, least, strict=True)]
        parts = [part * value for part, value in zip(share, floored, strict=True)]
        total = torch.stack(parts).sum(0)
        mixed = values[0].clone()
        for i, value in enumerate(values):
            coefficient = torch.where(total > 0, parts[i] / total.clamp_min(1e-300), torch.full_like(total, share[i]))
            taken[i] += float(coefficient.sum())
            mixed += coefficient * (value - values[0])
        return mixed

    return mix


def _normalized(information: Information) -> Information:
    """Of length 1 as one vector over all parameters; nothing stays nothing."""
    size = math.sqrt(math.fsum(float(value.square().sum()) for value in information.values())) or 1.0
    return {name: value / size for name, value in information.items()}


def _mean(information: Information) -> float:
    count = sum(value.numel() for value in information.values())
    return math.fsum(float(value.sum()) for value in information.values()) / max(1, count)


def _below(information: Information, least: float) -> float:
    """The share of the entries that lie below the floor."""
    count = sum(value.numel() for value in information.values())
    return sum(int((value < least).sum()) for value in information.values()) / max(1, count)
