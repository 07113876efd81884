"""Diffusion Soup: the mean of models trained on shards of the data; a shard comes and goes without training."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, nearest, word
from turnout.expects import MODELS, expects
from turnout.reshape.many_to_one.match import distance, filled, matched, refuse_infinite, rounded, tensors
from turnout.types import Report

Model = TypeVar("Model", bound=nn.Module)

__all__ = ["Soup", "soup"]

_WHERE = "turnout.reshape.soup"


@expects(shards=MODELS)
def soup(shards: Mapping[str, Model], *, counts: Mapping[str, int] | None = None) -> tuple[Model, Report]:
    """The mean of the models that were trained on shards of the data.

    theta* = sum_i n_i theta_i / sum_i n_i. A soup that changes later is a ``Soup``, which this is in one step.

    Args:
        shards: name -> model, at least one, fine-tuned from one start; they are left as they are.
        counts: name -> n_i, whole and at least 1 (documents, or 1 for each); None for equal ones.

    Returns:
        A copy of the first model with the mean; and the counts and the relative distance to each shard.

    Raises:
        UsageError: no shard, a count below 1 or for no shard, names or dtypes that differ (the first is named).
        ShapeError: shapes that differ.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(a.weight, 1.0), nn.init.constant_(b.weight, 4.0)
    >>> soup({"news": a, "code": b}, counts={"news": 2, "code": 1})[0].weight.tolist()
    [[2.0]]

    Source: Biggs et al., 2024, "Diffusion Soup: Model Merging for Text-to-Image Diffusion Models", the uniform soup;
    counts other than 1 are ours.
    """
    if not isinstance(shards, Mapping) or not shards:
        got, fix = f"a {type(shards).__name__} of {len(shards)}", 'pass {"news": model, "code": other}'
        raise UsageError(word("shards", got=got, allowed="map names to models", where=_WHERE, fix=fix))
    for name in counts or {}:
        if name not in shards:
            raise nearest(name, shards, kind="shard", where=_WHERE)
    matched(list(shards.values()), _WHERE)
    whole = Soup.start(next(iter(shards.values())))
    for name, model in shards.items():
        whole = whole.add(name, model, count=1 if counts is None else counts.get(name, 0))
    new, report = whole.model()
    return new, Report("soup", {**report.values, "relative_distances": [distance(new, m) for m in shards.values()]})


@dataclasses.dataclass(frozen=True, eq=False)
class Soup(Generic[Model]):
    """A running sum of models with counts, to which a shard is added and from which it is removed.

    It holds sum_i n_i theta_i in float64, however many shards there are, and a digest of each shard. Weights of 32 and
    16 bits add up without rounding in float64 unless one coordinate spans more than about 2^29 (the counts included),
    so a removed shard leaves the same bits that a soup without it has, in whatever order shards came; otherwise, and
    with float64 weights, both are equal up to the rounding of float64.

    Args:
        template: gives the result its class, configuration, names, dtypes and buffers of whole numbers; its weights are
            not part of the soup.
        totals: name -> sum_i n_i theta_i in float64.
        counts: shard -> n_i.
        digests: shard -> sha256 of its tensors, by which ``remove`` knows it.

    >>> a, b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.constant_(a.weight, 1.0), nn.init.constant_(b.weight, 4.0)
    >>> both = Soup.start(a).add("news", a).add("code", b)
    >>> both.model()[0].weight.tolist(), both.remove("news", a).model()[0].weight.tolist()
    ([[2.5]], [[4.0]])

    Source: Biggs et al., 2024, "Diffusion Soup: Model Merging for Text-to-Image Diffusion Models": continual learning
    and unlearning by averaging again. That removal needs the shard's model, and checks that it is the same, is ours.
    """

    template: Model
    totals: Mapping[str, Tensor]
    counts: Mapping[str, int]
    digests: Mapping[str, str]

    @classmethod
    def start(cls, template: Model) -> Self:
        """A soup of nothing, for models like this one."""
        found = tensors(template)
        zeros = {name: torch.zeros_like(t, dtype=torch.float64) for name, t in found.items() if t.is_floating_point()}
        return cls(template, zeros, {}, {})

    def add(self, shard: str, model: nn.Module, *, count: int = 1) -> Self:
        """The soup with one more shard, ``count`` times.

        Raises:
            UsageError: the shard is in it already, the count is below 1, or the model is not like the others.
        """
        if shard in self.counts:
            fix = "remove it first, or give the new one another name"
            raise UsageError(word("shard", got=shard, allowed="be new to the soup", where=_WHERE, fix=fix))
        if not isinstance(count, int) or count < 1:
            what, fix = f"the count of {shard!r}", "pass a count for every shard, 1 for each to weigh them equally"
            raise UsageError(word(what, got=count, allowed="be a whole number of at least 1", where=_WHERE, fix=fix))
        counts = {**self.counts, shard: count}
        return self._changed(model, count, counts, {**self.digests, shard: _digest(model)})

    def remove(self, shard: str, model: nn.Module) -> Self:
        """The soup without a shard.

        Args:
            shard: its name.
            model: the very model that was added; the sum alone does not know it.

        Raises:
            UnknownNameError: there is no such shard.
            UsageError: the model is not the one that was added, to the bit.
        """
        if shard not in self.counts:
            raise nearest(shard, self.counts, kind="shard", where=_WHERE)
        digest = _digest(model)
        if digest != self.digests[shard]:
            got, fix = f"one with digest {digest[:12]}", "load the weights as they were when the shard was added"
            allowed = f"be the one that was added, with digest {self.digests[shard][:12]}"
            raise UsageError(word(f"the model of {shard!r}", got=got, allowed=allowed, where=_WHERE, fix=fix))
        counts = {name: count for name, count in self.counts.items() if name != shard}
        digests = {name: known for name, known in self.digests.items() if name != shard}
        return self._changed(model, -self.counts[shard], counts, digests)

    def model(self) -> tuple[Model, Report]:
        """A copy of the template with the mean; and the counts and parameters.

        Raises:
            UsageError: no shard is in the soup, or the mean does not fit the dtype.
        """
        if not self.counts:
            fix = "add a shard first"
            raise UsageError(word("the soup", got="none", allowed="have a shard", where=_WHERE, fix=fix))
        total = sum(self.counts.values())
        mixed = {
            name: rounded(name, self.totals[name] / total, first.dtype, _WHERE) if name in self.totals else first
            for name, first in tensors(self.template).items()
        }
        new = filled(self.template, mixed)
        count = sum(parameter.numel() for parameter in new.parameters())
        return new, Report("soup", {"counts": dict(self.counts), "params_before": count, "params_after": count})

    def _changed(self, model: nn.Module, count: int, counts: Mapping[str, int], digests: Mapping[str, str]) -> Self:
        found = matched([self.template, model], _WHERE)[1]
        for name in self.totals:
            refuse_infinite(f"{name!r}", found[name], _WHERE)
        totals = {name: sum_ + count * found[name].to(sum_).double() for name, sum_ in self.totals.items()}
        return dataclasses.replace(self, totals=totals, counts=counts, digests=digests)


def _digest(model: nn.Module) -> str:
    """sha256 of the names, dtypes and bits of a model's tensors."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors(model).items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()
