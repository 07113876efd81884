"""A step of a model whose blocks a plan's schedule plays, for a comparison with one process."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from turnout.models import LM
from turnout.models.block_tasks import BlockTasks
from turnout.models.overlapped import Overlapped
from turnout.recipes.overlaps import check_played
from turnout.run.ranks.exchange import own_part
from turnout.run.ranks.shard import Meshes, shard
from turnout.types import BlockSchedule
from turnout.types.plan import Plan

__all__ = ["fitted", "played"]


class Rows(Protocol):
    """A part of a batch."""

    @property
    def id_BS(self) -> Tensor:
        """Tokens."""
        ...

    @property
    def target_BS(self) -> Tensor:
        """Which token came after each."""
        ...


def played(
    lm: LM, parts: Sequence[Rows], tokens: int, plan: Plan, meshes: Meshes, before: Callable[[Overlapped], None]
) -> Tensor:
    """This process's part of the loss, after passes of its rows; every parameter has its gradient then.

    Args:
        lm: the same on all; spread in place.
        parts: this process's micro-batches.
        tokens: how many targets there are in all.
        plan: its schedule is fitted to the sizes of this model.
        meshes: of its layout.
        before: what happens to the player before it plays.

    Raises:
        UsageError: a plan or a model that is not played.

    Source: none; the parts of ``turnout.run``.
    """
    schedule = check_played(plan, where="turnout parity", turns=("whole", "chunk"))
    shard(lm, plan.layout, meshes, plan=plan)
    leaves: dict[nn.Parameter, nn.Parameter] = {}

    def held(parameter: nn.Parameter) -> nn.Parameter:
        own = own_part(parameter.detach())
        return leaves.setdefault(parameter, nn.Parameter(own)) if hasattr(parameter, "to_local") else parameter

    block = BlockTasks(lm.blocks[0], 0, held=held)  # pyrefly: ignore[bad-argument-type]
    copies = meshes.experts["dp_replicate"].get_group()
    groups = {"data": meshes.data_group, "copies": copies if copies.size() > 1 else None}
    schedule = fitted(schedule, _bytes(block.dense), _bytes(block.expert))
    player = Overlapped(lm, schedule, group=meshes.expert_group, **groups, held=held)
    before(player)
    loss = torch.zeros((), dtype=torch.float64)
    for part in parts:
        loss += player.step(part.id_BS, part.target_BS, tokens=tokens).loss.double()
    player.close()
    for parameter, leaf in leaves.items():
        parameter.grad = None if leaf.grad is None else _as(leaf.grad, parameter)
    return loss


def fitted(schedule: BlockSchedule, dense: int, expert: int, *, each: int = 8) -> BlockSchedule:
    """The same order over gradients of other sizes, cut into as many pieces.

    Args:
        schedule: of another model, or of this one, which stays as it is.
        dense: bytes of a block's gradient without experts.
        expert: bytes of the gradient of this process's experts.
        each: bytes of a number, or a multiple; ends of pieces are multiples of it.

    >>> fitted(BlockSchedule(1, 1, 1, (), (), dense_bytes=(300, 100)), 64, 8).dense_bytes
    (40, 24)

    Source: none; arithmetic.
    """
    sizes = {"dense_bytes": _cut(schedule.dense_bytes, dense, each)}
    sizes["expert_bytes"] = _cut(schedule.expert_bytes, expert, each)
    return dataclasses.replace(schedule, **sizes)


def _cut(sizes: Sequence[int], total: int, each: int) -> tuple[int, ...]:
    if not sizes or sum(sizes) == total:
        return tuple(sizes)
    # One number at least in each piece; the last takes what is no multiple.
    spare, sums = total // each - len(sizes), [0, *itertools.accumulate(sizes)]
    ends = [(number + spare * one // sums[-1]) * each for number, one in enumerate(sums[:-1])] + [total]
    return tuple(end - start for start, end in itertools.pairwise(ends))


def _bytes(parameters: Sequence[Tensor]) -> int:
    return sum(p.numel() * p.element_size() for p in parameters if p.requires_grad)


def _as(grad: Tensor, parameter: nn.Parameter) -> Tensor:
    from torch.distributed.tensor import DTensor

    assert isinstance(parameter, DTensor)
    how = {"shape": parameter.shape, "stride": parameter.stride()}
    return DTensor.from_local(grad, parameter.device_mesh, parameter.placements, run_check=False, **how)
