"""Plays a pipeline schedule over the ranks of a process group, on torch's engine.

Which shapes travel is agreed on by all ranks before a step, gradients are sums (nothing is divided), and weights that
several stages hold keep one gradient. What is torch's own, and private there, is in ``torch_pipeline``.
"""

import collections
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turnout.errors import ShapeError, TurnoutError, UsageError, word
from turnout.run.ranks.processes import named, shared
from turnout.run.ranks.torch_pipeline import (
    Carried,
    Runtime,
    Stage,
    drop_forwards,
    lower,
    only_forward,
    split_before_backward,
    torch_schedule,
    unused,
)
from turnout.types.schedule import Schedule

__all__ = ["Carried", "Pipeline", "StageModule", "torch_schedule"]

_WHERE = "turnout.run.ranks.pipeline"


class StageModule(Protocol):
    """What a stage has to be: a module that is called with what the stage before handed on (the first: with nothing),
    and the microbatch as keywords; the last gives a scalar loss.
    """

    def __call__(self, *carried: Tensor, **microbatch: Any) -> Tensor:
        """The tensor for the next stage, or the loss."""
        ...

    def carries(self, **microbatch: Any) -> Carried:
        """The shape and dtype of what it hands on for this microbatch; the last is not asked."""
        ...


class Pipeline:
    """A schedule that is played over the ranks of a process group, again and again.

    After ``step`` the parameters of this rank's stages hold the gradients of the sum of all microbatches' losses.
    A parameter that several stages hold a copy of has the sum of all copies' gradients in each of them.

    Args:
        stages: this rank's stages by their number; each under ``fully_shard`` or not.
        schedule: who does what when; its ranks are those of ``group``.
        group: the pipeline's ranks, in order; None for all.
        device: of the stages.
        shared: name of a parameter -> the stages that hold a copy of it, for weights that are tied across stages.
        early: whether to post receives as soon as the sender's order allows; else right before they are needed, which
            keeps them from standing in the way of a stage's own collectives.

    Raises:
        UsageError: the stages are not those that the schedule gives this rank.

    Source: torch.distributed.pipelining's schedule runtime.
    """

    def __init__(
        self,
        stages: Mapping[int, nn.Module],
        schedule: Schedule,
        *,
        device: torch.device,
        group: dist.ProcessGroup | None = None,
        shared: Mapping[str, Sequence[int]] | None = None,
        early: bool = True,
    ) -> None:
        self.schedule, self.group, self.device = schedule, group, device
        self.rank = dist.get_rank(group)
        self._check(stages)
        self.stages = dict(sorted(stages.items()))
        self.shared = {name: tuple(sorted(holders)) for name, holders in (shared or {}).items()}
        made = [Stage(module, s, schedule.stages, device, group=group) for s, module in self.stages.items()]
        self._stages = made
        self._runtime = Runtime(
            cast(Any, made), schedule.microbatches, loss_fn=unused, scale_grads=False, defer_pp_recv=not early
        )
        lower(schedule, self._runtime)
        self._forward_only = only_forward(self._runtime.pipeline_order_with_comms)
        self._agreed: tuple[int, ...] | None = None
        self._broken = False

    def step(
        self, microbatches: Sequence[Mapping[str, Any]], *, settle: Callable[[], bool] | None = None
    ) -> dict[int, Tensor]:
        """Runs all microbatches forward and back.

        Args:
            microbatches: of each the keywords of every stage; the same on all ranks of the pipeline.
            settle: called after the forward passes that go before a rank's first backward pass, when the ranks behind
                have called theirs: says whether the weights were wrong so far, and drops the gradients of the step
                before. Where they were, on all ranks alike, what has run is run again.

        Returns:
            The loss of each microbatch on the rank of the last stage, detached; elsewhere nothing.

        Raises:
            ShapeError: ranks disagree on the shapes; on all of them, before anything runs.
            UsageError: another number of microbatches than the schedule's, or others than on the other ranks; a step
                before failed; or a shared parameter still holds gradients.
        """
        held = [] if settle is not None else self._held()
        problem = ""
        if held:
            allowed = "have no gradient before a step, whose copies' gradients are summed after it,"
            problem = word(held[0], got="one", allowed=allowed, where=_WHERE, fix="zero_grad(set_to_none=True) first")
        self._agree(microbatches, problem)
        if settle is None:
            self._play(microbatches)
        else:
            self._play_and_settle(microbatches, settle)
        self._sum_shared()
        return {index: loss.detach() for index, loss in self._runtime.losses.items()}

    @property
    def chain(self) -> tuple[int, ...]:
        """The ranks in the order of the last stage that each holds: in which what all know together is summed up, and
        from whose end it comes back, so that nobody waits for a rank that waits for it.
        """
        last = {rank: stage for stage, rank in enumerate(self.schedule.rank_of_stage)}
        return tuple(sorted(last, key=lambda rank: last[rank]))

    def _held(self) -> list[str]:
        return [name for name, copies in self._copies().items() for p in copies.values() if p.grad is not None]

    def _play_and_settle(self, microbatches: Sequence[Mapping[str, Any]], settle: Callable[[], bool]) -> None:
        """Forward passes, the verdict, and either the rest or all of it anew."""
        runtime, whole = self._runtime, self._runtime.pipeline_order_with_comms
        first, rest = split_before_backward(whole)
        for stage in self._stages:
            stage.later = []  # a rank may take in what another has sent only after its own verdict
        try:
            runtime.pipeline_order_with_comms = first
            self._play(microbatches)
            again = settle()
            assert not self._held(), "settle() drops the gradients of the step before"
            if again:
                drop_forwards(runtime, first)
                runtime.pipeline_order_with_comms = whole
                self._play(microbatches)
            else:
                runtime.pipeline_order_with_comms = rest
                self._play(microbatches, fresh=False)
            for stage in self._stages:
                for work in stage.later or ():
                    work.wait()
        finally:
            runtime.pipeline_order_with_comms = whole
            for stage in self._stages:
                stage.later = None

    @torch.no_grad()
    def forward(self, microbatches: Sequence[Mapping[str, Any]]) -> dict[int, Tensor]:
        """Runs all microbatches forward alone, without gradients; what the last stage gives, on its rank.

        Raises:
            ShapeError: as ``step``.
            UsageError: as ``step``.
        """
        self._agree(microbatches, "")
        runtime, whole = self._runtime, self._runtime.pipeline_order_with_comms
        runtime.pipeline_order_with_comms = self._forward_only
        try:
            self._play(microbatches, back=False)
        finally:
            runtime.pipeline_order_with_comms = whole
        return dict(runtime.losses)

    def _check(self, stages: Mapping[int, nn.Module]) -> None:
        size = dist.get_world_size(self.group)
        if self.schedule.ranks != size:
            got, allowed = f"one for {self.schedule.ranks} ranks", f"be for the {size} of its group"
            raise UsageError(word("the schedule", got=got, allowed=allowed, where=_WHERE, fix=f"make it with {size}"))
        mine = sorted(s for s in range(self.schedule.stages) if self.schedule.rank_of_stage[s] == self.rank)
        if sorted(stages) != mine:
            allowed = f"be {mine}, which the schedule gives rank {self.rank},"
            fix = "cut the model with turnout.models.stages.cut, and take those"
            raise UsageError(word("the stages", got=sorted(stages), allowed=allowed, where=_WHERE, fix=fix))

    def _play(self, microbatches: Sequence[Mapping[str, Any]], *, back: bool = True, fresh: bool = True) -> None:
        if fresh:
            self._runtime.losses.clear()
        for stage in self._stages if fresh else ():
            stage.has_backward = back
            stage.clear_runtime_states()
            stage.bwd_cache.clear()
        self._broken = True  # until it went well: receives that were posted are not taken back
        try:
            count = len(microbatches)
            keywords = [dict(each) for each in microbatches]
            self._runtime._step_microbatches([()] * count, keywords, [None] * count, return_outputs=False)
        except RuntimeError as error:
            if isinstance(error.__cause__, TurnoutError):  # torch wraps what a stage raises
                raise error.__cause__ from error
            raise
        self._broken = False

    # ---- shapes

    def _agree(self, microbatches: Sequence[Mapping[str, Any]], problem: str) -> None:
        """Every rank learns what is handed on in this step; a rank that cannot take part says so to all."""
        wanted, mine = self.schedule.microbatches, dict[int, list[Carried]]()
        if self._broken:
            fix = "start again from the last checkpoint"
            problem = word("a pipeline", got="one that failed", allowed="be whole", where=_WHERE, fix=fix)
        elif len(microbatches) != wanted:
            allowed, fix = f"be {wanted}, as the schedule has it", f"cut the batch into {wanted} parts"
            problem = word("microbatches", got=len(microbatches), allowed=allowed, where=_WHERE, fix=fix)
        else:
            try:
                for index, module in self.stages.items():
                    if index < self.schedule.stages - 1:
                        mine[index] = [cast(StageModule, module).carries(**each) for each in microbatches]
            except TurnoutError as error:
                problem = str(error)
        told = {str(index): [str(one) for one in row] for index, row in mine.items()}
        text = json.dumps([told, problem, [_sizes(each) for each in microbatches]])
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        words = [torch.zeros(2, dtype=torch.int64, device=self.device) for _ in range(self.schedule.ranks)]
        dist.all_gather(words, words[0].new_tensor([digest, _content(microbatches)]), group=self.group)
        agreed, contents = zip(*(each.tolist() for each in words), strict=True)
        if agreed == self._agreed and len(set(contents)) == 1:
            return
        plain = {str(index): [[list(one.shape), str(one.dtype)] for one in row] for index, row in mine.items()}
        said = shared([problem, plain, [_sizes(each) for each in microbatches]], self.group)
        _refuse(said, contents)
        handed = {int(index): [_carried(*one) for one in row] for _, rows, _ in said for index, row in rows.items()}
        if self._agreed is None:
            self._runtime._warmup_p2p(cast(Any, self._stages), True, False)
        for stage in self._stages:
            stage.prepare(handed.get(stage.stage_index - 1), handed.get(stage.stage_index), wanted)
        self._agreed = agreed

    # ---- parameters that several stages hold

    def _copies(self) -> dict[str, dict[int, nn.Parameter]]:
        """Name -> stage -> this rank's copies, of those that are trained."""
        found: dict[str, dict[int, nn.Parameter]] = {}
        for name, holders in self.shared.items():
            here = {s: dict(self.stages[s].named_parameters())[name] for s in holders if s in self.stages}
            if len(holders) > 1 and all(p.requires_grad for p in here.values()):
                found[name] = here
        return found

    @torch.no_grad()
    def _sum_shared(self) -> None:
        """Gives every copy the sum of all, added in the order of the stages, so that all copies get the same bits."""
        for name, here in self._copies().items():
            if not here:
                continue
            for parameter in here.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            part = {s: _local(p.grad) for s, p in here.items()}
            operations = []
            for s in self.shared[name]:
                other = self.schedule.rank_of_stage[s]
                if other == self.rank:
                    peers = sorted({self.schedule.rank_of_stage[t] for t in self.shared[name]} - {self.rank})
                    send = part[s].contiguous()
                    operations += [dist.P2POp(dist.isend, send, group=self.group, group_peer=peer) for peer in peers]
                else:
                    part[s] = torch.empty_like(next(iter(part.values())), memory_format=torch.contiguous_format)
                    operations.append(dist.P2POp(dist.irecv, part[s], group=self.group, group_peer=other))
            for work in dist.batch_isend_irecv(operations) if operations else []:
                work.wait()
            whole = part[self.shared[name][0]].clone()
            for s in self.shared[name][1:]:
                whole += part[s]
            for s in here:
                part[s].copy_(whole)


def _local(gradient: Any) -> Tensor:
    """The part of a gradient that is on this device."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _carried(shape: Sequence[int], dtype: str) -> Carried:
    """What another rank hands on, as it said."""
    return Carried(tuple(shape), getattr(torch, dtype.removeprefix("torch.")))


def _sizes(microbatch: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in sorted(microbatch.items()) if isinstance(value, Tensor)}


def _content(microbatches: Sequence[Mapping[str, Any]]) -> int:
    """A number that tells microbatches apart that have the same shapes."""
    found = 0
    for each in microbatches:
        for _, value in sorted(each.items()):
            if isinstance(value, Tensor):
                found = zlib.crc32(value.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes(), found)
            else:
                found = zlib.crc32(repr(value).encode(), found)
    return found


def _refuse(said: Sequence[tuple[str, Any, Any]], contents: Sequence[int]) -> None:
    """Raises the same on every rank where one cannot take part, or was given other microbatches.

    Raises:
        ShapeError: other shapes.
        UsageError: what a rank said.
    """
    problems = collections.defaultdict(list)
    for rank, (problem, _, _) in enumerate(said):
        if problem:
            problems[problem].append(rank)
    if problems:
        where = "; ".join(f"on {named(ranks)} of the pipeline: {text}" for text, ranks in problems.items())
        raise UsageError(where)
    first = said[0][2]
    for rank, (_, _, sizes) in enumerate(said):
        for index, (one, other) in enumerate(zip(first, sizes, strict=True)):
            if one != other:
                got = f"microbatch {index}: {one} on rank 0 of the pipeline, {other} on rank {rank}"
                allowed, fix = "have the same shapes on all ranks of a pipeline", "read the same batch on all of them"
                raise ShapeError(word("microbatches", got=got, allowed=allowed, where=_WHERE, fix=fix))
    others = [rank for rank, content in enumerate(contents) if content != contents[0]]
    if others:
        got, allowed = f"others on {named(others)} of the pipeline than on rank 0", "be the same on all its ranks"
        raise UsageError(word("microbatches", got=got, allowed=allowed, where=_WHERE, fix="read the same batch on all"))
