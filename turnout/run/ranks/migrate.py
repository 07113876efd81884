"""Experts that change hands while a model is trained: their weights travel, and all that an optimizer keeps of them."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.run.ranks.exchange import own_part
from turnout.run.ranks.expert_parallel import Owners
from turnout.run.ranks.shard import Meshes, experts_in, slots_of
from turnout.run.ranks.whole import settle
from turnout.types.placement import Placement

__all__ = ["Moved", "migrate"]

_WHERE = "turnout.run.ranks.migrate"


@dataclasses.dataclass(frozen=True)
class Moved:
    """What a migration sent.

    Args:
        copies: (layer, expert, process of the ep group that had it, process that got it).
        bytes: of weights and states together, that went from one process to another in one copy of the model.

    >>> Moved(((0, 3, 0, 1),), 96.0).bytes
    96.0

    Source: none; plain bookkeeping.
    """

    copies: tuple[tuple[int, int, int, int], ...]
    bytes: float


@torch.no_grad()
def migrate(
    model: nn.Module,
    placement: Placement,
    meshes: Meshes,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    held: Callable[[nn.Parameter], nn.Parameter] | None = None,
) -> Moved:
    """Brings a model that is spread to another placement of its experts, between two steps; every process calls it.

    What is computed then is the same, to the bit where no expert has more or fewer copies than before: rows of an
    expert meet in the same order wherever it lives. An expert that stays on its process stays in its slot, so that what
    travels is what ``Placement.moved`` says.

    Args:
        model: what ``turnout.run.ranks.shard.shard`` gave, with ep > 1.
        placement: of as many experts on each process as there are.
        meshes: that it was spread over.
        optimizer: what it keeps of each expert travels along.
        held: the parameter in the optimizer of each parameter of the model, where that is another.

    Returns:
        What travelled.

    Raises:
        UsageError: a model that is not spread, gradients that would be lost, or another number of slots.

    Source: none; He et al., 2022, "FasterMoE", and Nie et al., 2023, "FlexMoE", move experts' weights.
    """
    settle(model)
    copies, total = [], 0.0
    for layer, (name, experts) in enumerate(experts_in(model)):
        owners: Owners | None = getattr(experts, "owners", None)
        slots_S = slots_of(placement, layer, name)
        _check(name, experts, owners, slots_S)
        assert owners is not None
        table_S = _staying(owners, slots_S)
        jobs = _jobs(owners.expert_S.tolist(), table_S.tolist(), owners.slots)
        for parameter in experts.parameters():
            leaf = parameter if held is None else held(parameter)
            state = {} if optimizer is None else optimizer.state.get(leaf, {})
            tensors = [own_part(each) for each in (parameter, *state.values()) if isinstance(each, Tensor)]
            local = tensors[0]
            total += _send(parameter, [each for each in tensors if each.shape == local.shape], jobs, owners, meshes)
        vars(experts)["owners"] = Owners(table_S, owners.num_experts, owners.group)
        for source, target in jobs:
            if source // owners.slots != target // owners.slots:
                expert = int(table_S[target])
                copies.append((layer, expert, source // owners.slots, target // owners.slots))
    return Moved(tuple(copies), _summed(total, meshes))


def _check(name: str, experts: Any, owners: Owners | None, slots_S: Tensor) -> None:
    def refuse(got: str, allowed: str, fix: str) -> UsageError:
        return UsageError(word(f"the experts of {name}", got=got, allowed=allowed, where=_WHERE, fix=fix))

    if owners is None or getattr(experts, "share", 1) > 1:
        got = "on one process" if owners is None else "ones that share factors"
        raise refuse(got, "be spread over processes, each by itself,", "train with ep=2 or more")
    if len(slots_S) != len(owners.expert_S):
        got, allowed = f"{len(slots_S)} copies", f"be the {len(owners.expert_S)} that there is room for"
        raise refuse(got, allowed, "place as many, or go on from a checkpoint with another plan")
    if any(parameter.grad is not None for parameter in experts.parameters()):
        raise refuse("gradients", "have none, which would stay behind", "migrate after optimizer.zero_grad()")


def _staying(owners: Owners, slots_S: Tensor) -> Tensor:
    """The new table, in which what stays on a process keeps its slot and what is new there takes the slots that are
    free.
    """
    ranks, found = owners.group.size(), []
    for old, new in zip(owners.expert_S.view(ranks, -1).tolist(), slots_S.view(ranks, -1).tolist(), strict=True):
        arriving = iter([expert for expert in new if expert not in old])
        found += [expert if expert in new else next(arriving) for expert in old]
    return torch.tensor(found)


def _jobs(old: list[int], new: list[int], slots: int) -> list[tuple[int, int]]:
    """(slot that has it, slot that gets it) for each slot whose expert changes; from the first process that has it."""
    return [(old.index(new[slot]), slot) for slot in range(len(new)) if new[slot] != old[slot]]


def _send(
    parameter: Any, tensors: list[Tensor], jobs: Iterable[tuple[int, int]], owners: Owners, meshes: Meshes
) -> float:
    """Carries rows of some tensors of the same parts from slot to slot; the bytes that this process sent."""
    import torch.distributed as dist

    grid, coordinate = meshes.experts.mesh, meshes.experts.get_coordinate()
    assert coordinate is not None
    stage, copy, inner, _ = coordinate
    shards, rank = meshes.experts["efsdp"].size(), dist.get_rank()
    split = shards > 1 and parameter.placements[-2].dim == 0  # whole experts on each shard, else a part of each
    each = -(-owners.slots // shards) if split else owners.slots

    def at(slot: int) -> tuple[int, int]:
        """The process that has a slot, or its counterpart of this shard, and the row there."""
        process, row = divmod(slot, owners.slots)
        return int(grid[stage, copy, row // each if split else inner, process]), row % each

    sent, operations, arriving = 0.0, [], []
    for source, target in jobs:
        (giver, from_row), (taker, to_row) = at(source), at(target)
        for tensor in tensors:
            if giver == rank == taker:
                arriving.append((tensor, to_row, tensor[from_row].clone()))
            elif giver == rank:
                row = tensor[from_row].contiguous().clone()
                sent += row.numel() * row.element_size()
                operations.append(dist.P2POp(dist.isend, row, taker))
            elif taker == rank:
                row = torch.empty_like(tensor[to_row], memory_format=torch.contiguous_format)
                arriving.append((tensor, to_row, row))
                operations.append(dist.P2POp(dist.irecv, row, giver))
    for work in dist.batch_isend_irecv(operations) if operations else []:
        work.wait()
    for tensor, row, value in arriving:
        tensor[row] = value
    return sent


def _summed(total: float, meshes: Meshes) -> float:
    """Over the processes of one copy of the model's stage."""
    import torch.distributed as dist

    summed = torch.tensor([total], dtype=torch.float64, device=meshes.dense.device_type)
    dist.all_reduce(summed, group=meshes.data_group)
    return float(summed) / meshes.experts["dp_replicate"].size()
