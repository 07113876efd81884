"""Faults of training on many processes, planted on purpose: what a comparison of gradients must not let pass."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, nearest, word
from turnout.models.overlapped import Overlapped
from turnout.run.blocks.block_parts import Gated
from turnout.run.ranks.shard import Meshes, experts_in
from turnout.types import Routing

__all__ = ["FAULTS", "PLAYED", "Fault"]

_WHERE = "turnout.recipes.planted"


class Fault:
    """Something that goes wrong: before the forward pass, in what is spread, or after the backward pass.

    Args:
        name: one of ``FAULTS``; or of ``PLAYED``, where the plan has a block schedule.

    Raises:
        UnknownNameError: another name.

    >>> Fault("drop").name
    'drop'

    Source: none; the defects of pytorch#160285, torchtitan#1551 and torchtitan#4054, and two more.
    """

    def __init__(self, name: str) -> None:
        if name not in FAULTS and name not in PLAYED:
            raise nearest(name, [*FAULTS, *PLAYED], kind="fault", where=_WHERE)
        self.name = name

    def plant(self, model: nn.Module, meshes: Meshes) -> None:
        """Changes the model that is spread, before it is used."""
        if self.name in PLAYED:
            got, fix = "a plan without a block schedule", "take a plan of turnout plan --overlap"
            raise UsageError(word(f"the fault {self.name!r}", got=got, allowed="have one", where=_WHERE, fix=fix))
        experts = [module for _, module in experts_in(model)]
        if self.name in ("factor", "drop") and (not experts or (self.name == "factor" and meshes.layout.ep == 1)):
            got = f"a model with {len(experts)} routed layers, ep={meshes.layout.ep}"
            allowed = "have experts on several processes" if self.name == "factor" else "have experts"
            fix = "plant 'skip', or take a layout with ep=2"
            raise UsageError(word(f"the fault {self.name!r}", got=got, allowed=allowed, where=_WHERE, fix=fix))
        if self.name == "drop":
            _drop(experts[0])
        if self.name == "skip":
            _skip(model)

    def play(self, player: Overlapped) -> None:
        """Changes the player of a block schedule, in the place of ``plant``."""
        if self.name == "drop":
            _drop_rows(player.parts[0])
        if self.name == "chunk":
            _drop_chunk(player.parts[0])
        if self.name in ("skip", "twice"):
            _sum_often(player.player, {"skip": 0, "twice": 2}[self.name])

    def spoil(self, model: nn.Module, meshes: Meshes) -> None:
        """Changes the gradients that came out."""
        if self.name == "factor":
            if meshes.layout.ep == 1:
                got, fix = "ep=1", "plant 'skip', or take a layout with ep=2"
                allowed = "have experts on several processes"
                raise UsageError(word("the fault 'factor'", got=got, allowed=allowed, where=_WHERE, fix=fix))
            self._scale((p for _, module in experts_in(model) for p in module.parameters()), meshes.layout.ep)
        if self.name == "average":
            self._scale(model.parameters(), 1 / meshes.layout.data_ranks)
        if self.name == "lose":
            next(p for p in model.parameters() if p.grad is not None).grad = None

    @staticmethod
    def _scale(parameters: Any, factor: float) -> None:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


FAULTS: Mapping[str, str] = {
    "factor": "the gradients of experts are ep times too large, as averages over unlike meshes make them",
    "average": "all gradients are averaged over the processes once too often",
    "skip": "the gradients of one block are not summed over the processes",
    "drop": "the tokens of one expert are lost",
    "lose": "one parameter gets no gradient",
}
# Of a block schedule alone.
PLAYED: Mapping[str, str] = {
    "twice": "the pieces of one block's gradient are summed twice",
    "chunk": "what the experts made of one chunk of the rows is lost",
}


def _drop_rows(part: Any) -> None:
    gate: Callable[..., Gated] = part.gate

    def without(*given: Any) -> Gated:
        gated = gate(*given)
        lost_R = gated.expert_R == gated.expert_R.mode().values if len(gated.expert_R) else gated.expert_R > 0
        return dataclasses.replace(gated, weight_R=gated.weight_R.masked_fill(lost_R, 0.0))

    part.gate = without


def _drop_chunk(part: Any) -> None:
    combine: Callable[..., Tensor] = part.combine
    chunks = itertools.count()

    def without(sum_TD: Tensor, *kept: Tensor) -> Tensor:
        return combine(sum_TD * 0 if next(chunks) == 0 else sum_TD, *kept)

    part.combine = without


def _sum_often(player: Any, times: int) -> None:
    """The dense gradient of the first block is summed over the processes so many times."""
    reduce: Callable[..., int] = player._reduce_dense

    def often(done: Any, at: tuple[int, int]) -> int:
        return sum(reduce(done, at) for _ in range(1 if at[0] else times))

    player._reduce_dense = often


def _drop(experts: Any) -> None:
    forward: Callable[..., Tensor] = experts.forward

    def without(x_TD: Tensor, routing: Routing, **how: Any) -> Tensor:
        return forward(x_TD, routing.keep(routing.expert_R != int(routing.load_E.argmax())), **how)

    experts.forward = without


def _skip(model: nn.Module) -> None:
    """The first block's gradients stay what this process alone has."""
    from torch.distributed.fsdp import FSDPModule

    held = [module for module in model.modules() if isinstance(module, FSDPModule)]
    blocks = held[1:] or held  # the outermost, which holds what is left of the model, comes first
    if not blocks:
        got, allowed, fix = "one process", "have several processes", "take a layout of two or more"
        raise UsageError(word("the fault 'skip'", got=got, allowed=allowed, where=_WHERE, fix=fix))
    for state in blocks[0]._get_fsdp_state()._fsdp_param_groups:
        state._reduce_scatter_comm = _Alone()  # pyrefly: ignore[bad-assignment]
    blocks[0].set_requires_all_reduce(False)


class _Alone:
    """In the place of a reduce-scatter: this process's own share of its own gradients."""

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """An empty tensor."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, **how: Any) -> None:
        """Takes the part that belongs here."""
        output_tensor.copy_(input_tensor.chunk(group.size())[group.rank()])
