"""A model in the stages of a pipeline, each spread over processes, for a comparison with one process."""

from collections.abc import Iterator
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turnout.decide.device import named_schedule
from turnout.errors import UsageError, word
from turnout.models import LM
from turnout.models.stages import cut, even_stages, shared_parameters
from turnout.run.pipeline import Pipeline
from turnout.run.shard import Meshes, shard
from turnout.run.whole import gradient_norm, whole, whole_gradients
from turnout.types.plan import Plan

__all__ = ["Piped", "Rows"]


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

    def part(self, number: int, parts: int) -> "Rows":
        """One of equal parts of it."""
        ...


class Piped:
    """This process's stages.

    Args:
        lm: the whole model, the same on every process.
        plan: with the schedule, the microbatches, and how many blocks a stage has.
        meshes: of the plan's layout.

    Raises:
        UsageError: another number of stages in the plan than its schedule has.

    Source: none; the parts of a plan put together.
    """

    def __init__(self, lm: LM, plan: Plan, meshes: Meshes) -> None:
        self.plan, self.meshes = plan, meshes
        schedule = named_schedule(plan.schedule, plan.layout.pp, plan.microbatches)
        sizes = plan.stages or even_stages(lm.config.layers, schedule.stages)
        if len(sizes) != schedule.stages:
            got, allowed = f"{len(sizes)} of them", f"be the {schedule.stages} of {plan.schedule} on {plan.layout.pp}"
            fix = "leave stages out for even ones"
            raise UsageError(word("stages", got=got, allowed=allowed, where="a plan", fix=fix))
        group = meshes.dense["pp"].get_group()
        rank = dist.get_rank(group)
        stages = cut(lm, sizes, only=[s for s, holder in enumerate(schedule.rank_of_stage) if holder == rank])
        shared = shared_parameters(lm, sizes)
        for stage in stages.values():
            shard(stage, plan.layout, meshes, plan=plan)
        self.pipeline = Pipeline(stages, schedule, device=torch.device("cpu"), group=group, shared=shared)
        self.model = nn.ModuleList(stages.values())
        self.last = schedule.stages - 1 in stages
        # Of those that several stages hold, the copies that are not the first.
        self.again = {(s, name) for name, holders in shared.items() for s in holders[1:] if s in stages}

    def step(self, rows: Rows, predicted: int) -> Tensor:
        """Forward and backward passes of this process's rows; the loss of all rows."""
        count = self.plan.microbatches
        parts = [rows.part(number, count) for number in range(count)]
        microbatches = [{"id_BS": p.id_BS, "target_BS": p.target_BS, "predicted": predicted} for p in parts]
        losses = self.pipeline.step(microbatches)
        total = torch.zeros((), dtype=torch.float64)
        for loss in losses.values():
            total += loss.double()
        dist.all_reduce(total, group=self.meshes.data_group)  # a stage's data ranks
        # Ranks of other stages learn it from those of the last.
        dist.all_reduce(total, group=self.pipeline.group)
        return total

    def norm(self) -> Tensor:
        """Of all gradients, each once."""
        aside = {}
        for s, name in self.again:
            parameter = dict(self.pipeline.stages[s].named_parameters())[name]
            aside[parameter], parameter.grad = parameter.grad, None
        found = gradient_norm(self.model, self.meshes)
        for parameter, grad in aside.items():
            parameter.grad = grad
        return found

    def gradients(self) -> Iterator[tuple[str, Tensor | None]]:
        """Of every parameter of every stage, a copy after the other; on the first process alone."""
        for stage in range(self.pipeline.schedule.stages):
            mine = self.pipeline.stages.get(stage)
            yield from self._told(stage, [] if mine is None else list(whole_gradients(mine)))

    def weights(self) -> Iterator[tuple[str, Tensor | None]]:
        """As ``gradients``."""
        for stage in range(self.pipeline.schedule.stages):
            mine = self.pipeline.stages.get(stage)
            yield from self._told(stage, [] if mine is None else list(whole(mine, dict(mine.named_parameters()))))

    def _told(self, stage: int, found: list[tuple[str, Tensor | None]]) -> list[tuple[str, Tensor | None]]:
        """What the first data rank of a stage has, on the first process."""
        holder = self.pipeline.schedule.rank_of_stage[stage]
        says = found if self.pipeline.rank == holder and self.meshes.data_rank == 0 else []
        heard: list[list[tuple[str, Tensor | None]]] | None = None
        if dist.get_rank() == 0:
            heard = [[] for _ in range(dist.get_world_size())]
        dist.gather_object(says, heard, dst=0)
        return [each for one in heard or [] for each in one]
