"""Processes that share every batch, and hold a model in shards: the team of ``turnout.run.ranks.shard`` in the loop."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from turnout.errors import UsageError, word
from turnout.run.ranks.exchange import own_part
from turnout.run.ranks.processes import Ranks, shared
from turnout.run.ranks.shard import Meshes, accumulate
from turnout.run.ranks.watch import answering, lead
from turnout.run.ranks.whole import copies_of, of_experts
from turnout.train import parts
from turnout.train.balance import Whole, demand
from turnout.train.team import Passed, Weights
from turnout.types import Routing

__all__ = ["Sharded"]

_WHERE = "turnout.train.sharded"


class Sharded:
    """A ``Team`` of many processes.

    Args:
        ranks: from ``turnout.run.ranks.processes.start``.
        meshes: from ``turnout.run.ranks.shard.mesh``.
        model: what ``turnout.run.ranks.shard.shard`` gave.

    Source: Rajbhandari et al., 2020, "ZeRO": each process updates what it holds, with its own part of the state.
    """

    def __init__(self, ranks: Ranks, meshes: Meshes, model: nn.Module) -> None:
        self.ranks, self.meshes, self.model = ranks, meshes, model
        self.size = meshes.layout.data_ranks
        self._held = {id(p): self.leaf(name, p) for name, p in model.named_parameters()}
        self._groups = {id(self._held[id(p)]): _sharing(p) for p in model.parameters()}
        self._named = dict(model.named_parameters())

    def leaf(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """What of a parameter this process updates, in the same memory."""
        spread = self.size > 1 or self.meshes.layout.pp == 1  # else there is nobody to share a stage with
        return _leaf(name, parameter, spread=spread)

    @property
    def first(self) -> bool:
        """Whether this is rank 0."""
        return self.ranks.is_first

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.ranks.rank

    @property
    def holders(self) -> tuple[int, ...]:
        """The ranks that share the tensors that this one has a part of."""
        return tuple(dist.get_process_group_ranks(self.meshes.data_group))

    @property
    def schedules(self) -> bool:
        """Not: the model is called as it is."""
        return False

    @property
    def salt(self) -> tuple[int, ...]:
        """The number of its part of the batch."""
        return (self.meshes.data_rank,)

    def part(self, batch: Any) -> Any:
        """Its rows, a data rank's share, in order."""
        rows = len(batch.id_BS)
        if rows % self.size:
            allowed, near = f"be a multiple of the {self.size} ranks that share it", rows + -rows % self.size
            raise UsageError(word("batch", got=rows, allowed=allowed, where=_WHERE, fix=f"pass batch={near}"))
        each = rows // self.size
        own = slice(self.meshes.data_rank * each, (self.meshes.data_rank + 1) * each)
        names = [name for name in ("domain_B", "real_BS") if getattr(batch, name, None) is not None]
        cut = {name: getattr(batch, name)[own] for name in ("id_BS", "target_BS", *names)}
        return dataclasses.replace(batch, **cut)

    @torch.no_grad()
    def wholes(self, routings: Sequence[Routing]) -> Sequence[Whole | None]:
        """What all rows chose, in one sum over the data ranks."""
        if not routings:
            return []
        rows = [torch.cat([demand(routing), _counted(routing)]) for routing in routings]
        total = torch.cat(rows)
        dist.all_reduce(total, group=self.meshes.data_group)
        return [Whole(row[:-1], row[-1]) for row in total.split([len(row) for row in rows])]

    def passed(
        self, id_BS: Tensor, target_BS: Tensor, real_BS: Tensor | None, weights: Weights, *, tokens: int, seed: int
    ) -> Passed | None:
        """None: the model is called as it is."""

    def own(self, load_L: Sequence[Tensor]) -> Sequence[Tensor]:
        """All of them: this process has a part of every layer."""
        return load_L

    def measured(self, model: nn.Module, measure: Callable[[nn.Module], dict[str, Any]]) -> dict[str, Any]:
        """What is measured of it, on every process alike."""
        return measure(model)

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over the data ranks."""
        dist.all_reduce(tensor := tensor.clone(), group=self.meshes.data_group)
        return tensor

    def held(self, parameter: nn.Parameter) -> nn.Parameter:
        """Its part of it, in the same memory."""
        return self._held[id(parameter)]

    def passing(self, *, last: bool) -> None:
        """Gradients travel when the layout says."""
        accumulate(self.model, self.meshes.layout, last=last)

    @torch.no_grad()
    def collect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Hands each gradient's own part to the part of the parameter."""
        for parameter in parameters:
            leaf = self._held[id(parameter)]
            assert leaf.data_ptr() == own_part(parameter.detach()).data_ptr(), "FSDP2 has moved a parameter's memory"
            leaf.grad = None if parameter.grad is None else own_part(parameter.grad)
            parameter.grad = None

    @torch.no_grad()
    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Over all shards, each number once, also those of an expert with copies."""
        return self.squares(parameters).sqrt()

    def squares(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """The sum of the squares of these parameters' gradients, over those that share them."""
        copies = {
            id(self._held[id(self._named[name])]): copies_of(owners, self._named[name])  # pyrefly: ignore
            for name, owners in of_experts(self.model).items()
            if owners.copied
        }
        kinds: dict[tuple[dist.ProcessGroup, ...], list[Tensor]] = {}
        for leaf in parameters:
            grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
            if (count := copies.get(id(leaf))) is not None:
                grad = grad / count.to(grad).sqrt().view(-1, *[1] * (grad.ndim - 1))
            kinds.setdefault(self._groups[id(leaf)], []).append(grad)
        squares = []
        for groups, gradients in kinds.items():
            square = torch.nn.utils.get_total_norm(gradients).square()
            for group in groups:
                dist.all_reduce(square, group=group)
            squares.append(square)
        return torch.stack(squares).sum() if squares else torch.zeros(())

    def together(self, doing: Callable[[], str]) -> contextlib.AbstractContextManager[None]:
        """As ``turnout.run.ranks.watch.answering``."""
        return answering(self.ranks, doing)

    def lead(self, action: Callable[[], Any]) -> Any:
        """As ``turnout.run.ranks.watch.lead``."""
        return lead(self.ranks, action)

    def said(self, value: Any) -> list[Any]:
        """As ``turnout.run.ranks.processes.shared``."""
        return shared(value)

    def heard(self, asked: str | None) -> str | None:
        """The signal that any rank was sent; one small sum where none was."""
        some = torch.tensor([asked is not None], dtype=torch.int32)
        dist.all_reduce(some)
        return next(filter(None, shared(asked)), None) if int(some) else None

    def gather(self, into: nn.Module | None) -> None:
        """Copies every whole tensor into a model in one piece; all ranks call it.

        Args:
            into: the model; None for a rank that only lends its parts.
        """
        parts.gather(parts.pieces(self.model, {}), into)

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
        """Writes a checkpoint, each rank a share of the tensors, whole; see ``turnout.train.parts``."""
        parts.save(self, folder, step, parts.pieces(model, self._held), optimizer, state, keep=keep)

    def load(
        self,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        check: Callable[[Mapping[str, Any]], None],
    ) -> dict[str, Any]:
        """Reads what any number of ranks wrote, under any layout, or one process alone."""
        return parts.load(path, parts.pieces(model, self._held), optimizer, check=check)


def _leaf(name: str, parameter: nn.Parameter, *, spread: bool) -> nn.Parameter:
    if spread and not isinstance(parameter, DTensor):
        got, allowed = f"{name}, of which nobody shares the gradients", "be spread over the ranks"
        fix = "call turnout.run.ranks.shard.shard(model, ...) first"
        raise UsageError(word("a parameter", got=got, allowed=allowed, where=_WHERE, fix=fix))
    return nn.Parameter(own_part(parameter.detach()), requires_grad=parameter.requires_grad)


def _sharing(parameter: Tensor) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which the parts of a parameter are different numbers."""
    if not isinstance(parameter, DTensor):  # the same everywhere
        return ()
    mesh = parameter.device_mesh
    return tuple(mesh.get_group(axis) for axis, place in enumerate(parameter.placements) if not place.is_replicate())


def _counted(routing: Routing) -> Tensor:
    count = routing.num_tokens if routing.real_T is None else routing.real_T.sum()
    return torch.as_tensor(count, device=routing.load_E.device, dtype=torch.int64).reshape(1)
