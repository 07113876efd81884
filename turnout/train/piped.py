"""Processes that hold a model in the stages of a pipeline, each of which others may share: their team in the loop."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turnout.errors import UsageError, word
from turnout.models.piped import Piped
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import Meshes
from turnout.run.ranks.whole import settle
from turnout.train import parts
from turnout.train.sharded import Sharded
from turnout.train.sides import Sides
from turnout.train.team import Passed, Weights

__all__ = ["Pipelined"]

_WHERE = "turnout.train.piped"


class Pipelined(Sharded):
    """A ``Team`` whose processes hold a stage or several.

    Each micro-batch of a step (``accumulate`` of them) goes through the pipeline in ``Plan.microbatches`` parts of its
    rows. A balance loss is of the whole micro-batch, so that no part's share of it is known before all parts were
    routed: where it has a weight, all forward passes are run once more beforehand, without gradients.

    Args:
        ranks: from ``turnout.run.ranks.processes.start``.
        meshes: of the plan's layout.
        model: this process's stages.
        make: gives, on the first process, a model that the whole weights are copied into: what is measured.

    Raises:
        UsageError: a process without anything to train.

    Source: Huang et al., 2019, "GPipe". The losses in parts are ours.
    """

    @property
    def schedules(self) -> bool:
        """It does."""
        return True

    def __init__(self, ranks: Ranks, meshes: Meshes, model: Piped, *, make: Callable[[], nn.Module]) -> None:
        super().__init__(ranks, meshes, model)
        self.piped, self.make = model, make
        _refuse_idle(self.said(len(self._held)))
        self._parameters = list(model.parameters())
        again = [p for name, p in model.named_parameters() if name in model.again]
        self._again = {id(self._held[id(p)]) for p in again}
        self._sides = Sides(model.numbered)
        self._casts = False
        # Stage -> name and shape of what it holds in a checkpoint, each name in the first stage that has it.
        mine = {str(stage): [[piece.name, piece.shape] for piece in self._pieces(stage)] for stage in model.numbered}
        everyone = {int(stage): rows for said in self.said(mine) for stage, rows in said.items()}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._names: dict[int, list[str]] = {}
        for stage in sorted(everyone):
            self._names[stage] = [name for name, _ in everyone[stage] if name not in self._shapes]
            self._shapes |= {name: tuple(shape) for name, shape in everyone[stage]}

    def _pieces(self, stage: int) -> list[parts.Piece]:
        return parts.pieces(self.piped.numbered[stage], self._held)

    def _owned(self, stage: int) -> list[parts.Piece]:
        """What a stage holds, without the copies of what an earlier one does."""
        return [piece for piece in self._pieces(stage) if piece.name in set(self._names[stage])]

    # ---- a step

    def passing(self, *, last: bool) -> None:
        """Nothing: the schedule says when gradients travel."""

    def passed(
        self, id_BS: Tensor, target_BS: Tensor, real_BS: Tensor | None, weights: Weights, *, tokens: int, seed: int
    ) -> Passed:
        """Sends the rows through the pipeline, in equal parts."""
        if weights.bf16 and not self._casts:
            self._cast(id_BS.device.type)
        microbatches = self._cut(id_BS, target_BS, real_BS, weights.predicted, seed)
        sides = self._sides
        if not sides.known:
            self._forward(microbatches)
            sides.learn(self.said(sides.kinds()))
        wholes = None
        if weights.aux > 0 and sides.scored:
            self._forward(microbatches)
            wholes = sides.demands()
        sides.begin(weights, tokens, wholes)
        found = self.piped.step(microbatches)
        wanted = sides.demands() if wholes is None else wholes
        with torch.no_grad():
            self._take()
            nats = sum(found.values(), start=torch.zeros((), device=id_BS.device))
            losses_4 = torch.stack([nats, *sides.values(wanted), torch.zeros_like(nats)])
        return Passed(losses_4, wanted, sides.scored, sides.logged)

    def _forward(self, microbatches: Sequence[Mapping[str, Any]]) -> None:
        """Forward passes alone, of which the routings are counted."""
        self._sides.count()
        self.piped.pipeline.forward(microbatches)

    def _cut(
        self, id_BS: Tensor, target_BS: Tensor, real_BS: Tensor | None, predicted: int, seed: int
    ) -> list[dict[str, Any]]:
        count, rows = self.piped.plan.microbatches, len(id_BS)
        if rows % count:
            got, allowed = f"{rows} rows on a process", f"come out even in {count} microbatches"
            fix = f"pass batch={(rows + -rows % count) * self.size}"
            raise UsageError(word("batch", got=got, allowed=allowed, where=_WHERE, fix=fix))
        cut: dict[str, Any] = {"id_BS": id_BS.chunk(count), "target_BS": target_BS.chunk(count)}
        if real_BS is not None:
            cut["attention_mask"] = real_BS.chunk(count)
        each = [{name: rows[number] for name, rows in cut.items()} for number in range(count)]
        # One seed for each part: two rows of a batch do not draw the same.
        return [{**one, "predicted": predicted, "seed": (seed + number) % 2**63} for number, one in enumerate(each)]

    def _cast(self, device: str) -> None:
        """Puts the forward passes under autocast, and them alone."""
        for stage in self.piped.numbered.values():
            inside = stage.forward
            stage.forward = torch.autocast(device, dtype=torch.bfloat16)(inside)  # pyrefly: ignore[bad-assignment]
        self._casts = True

    def _take(self) -> None:
        """Adds the gradients to those that were taken before in this step; a pipeline begins without any."""
        settle(self.piped)
        taken = [(self._held[id(p)], self._held[id(p)].grad) for p in self._parameters]
        super().collect(self._parameters)
        for leaf, before in taken:
            if before is not None:
                leaf.grad = before if leaf.grad is None else leaf.grad + before

    def collect(self, parameters: Iterable[nn.Parameter]) -> None:
        """Nothing: gradients were taken after each pass."""

    def own(self, load_L: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of this process's stages."""
        return [load_L[at] for at in self._sides.mine] if self._sides.known else []

    def total(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, of all stages."""
        dist.all_reduce(tensor := tensor.clone())
        return tensor

    @torch.no_grad()
    def norm(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """Over all stages and shards, each number once."""
        square = self.squares([leaf for leaf in parameters if id(leaf) not in self._again]).to(self.ranks.device)
        dist.all_reduce(square, group=self.piped.pipeline.group)
        return square.sqrt()

    # ---- the whole model

    def measured(self, model: nn.Module, measure: Callable[[nn.Module], dict[str, Any]]) -> dict[str, Any]:
        """What the first process measures of the model in one piece, while the others wait."""
        whole = self.make().to(self.ranks.device).eval() if self.first else None
        self.gather(whole)
        return self.lead(lambda: measure(whole))  # pyrefly: ignore[bad-argument-type]

    @torch.no_grad()
    def gather(self, into: nn.Module | None) -> None:
        """Copies every whole tensor into a model in one piece, on the first process; all of them call it.

        Args:
            into: the model; None on the others.
        """
        places: dict[str, Tensor] = {} if into is None else dict([*into.named_parameters(), *into.named_buffers()])
        share = self.ranks.world // self.meshes.layout.pp
        for stage, holder in enumerate(self.piped.pipeline.schedule.rank_of_stage):
            source = holder * share  # the first of those that share the stage
            if stage in self.piped.numbered:
                for piece in self._owned(stage):
                    whole = piece.whole()
                    if self.first:
                        places[piece.name].copy_(whole)
                    elif self.rank == source:
                        dist.send(whole.contiguous(), dst=0)
            elif self.first:
                for name in self._names[stage]:
                    room = torch.empty(places[name].shape, dtype=places[name].dtype, device=self.ranks.device)
                    dist.recv(room, src=source)
                    places[name].copy_(room)

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
        """Writes a checkpoint, each rank a share of its stages' tensors, by their names in the whole model."""
        held = [piece for stage in self.piped.numbered for piece in self._owned(stage)]
        parts.save(self, folder, step, held, optimizer, state, keep=keep)

    def load(
        self,
        path: Path,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        check: Callable[[Mapping[str, Any]], None],
    ) -> dict[str, Any]:
        """Reads what any number of ranks wrote, under any layout, or one process alone."""
        held = [piece for stage in self.piped.numbered for piece in self._pieces(stage)]
        return parts.load(path, held, optimizer, check=check, shapes=self._shapes)


def _refuse_idle(held: Sequence[int]) -> None:
    idle = [rank for rank, count in enumerate(held) if not count]
    if idle:
        got, allowed = f"none on rank {idle[0]}", "give every process something to train"
        fix = "leave stages out for even ones"
        raise UsageError(word("the plan's stages", got=got, allowed=allowed, where=_WHERE, fix=fix))
