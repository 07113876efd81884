"""Plays a pipeline schedule on torch's engine: the one file that knows the private names of torch's pipelining.

Torch's runtime (``torch.distributed.pipelining``) takes any order of forward, dInput and dWeight actions and adds the
messages itself. What is different here: which shapes travel is agreed on by all ranks before a step, so that a step may
be shaped as no step before it (torch's own answer to that is an abort of the process), microbatches of one step may
differ, and no stage is run an extra time to find its shapes out; losses are told apart by their microbatch, so that
the last stage may take them in any order; and gradients are sums, nothing is divided.
"""

import collections
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turnout.errors import MissingExtraError, ShapeError, TurnoutError, UsageError, word
from turnout.types.schedule import Action, Schedule

_WHERE = "turnout.run.pipeline"


def _moved(name: str) -> MissingExtraError:
    """What is said where a torch has other private names than the one that this file was written for."""
    allowed, fix = f"have {name}, which turnout's pipelines are built on,", "install torch 2.13, or train with pp=1"
    return MissingExtraError(word("torch", got=f"torch {torch.__version__}", allowed=allowed, where=_WHERE, fix=fix))


try:
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining._schedule_visualizer import get_schedule_ops
    from torch.distributed.pipelining._utils import _TensorMeta
    from torch.distributed.pipelining.schedules import (
        _Action,
        _add_reduce_grad,
        _add_send_recv,
        _ComputationType,
        _PipelineScheduleRuntime,
    )
    from torch.distributed.pipelining.stage import _RecvInfo
except ImportError as _error:
    raise _moved(f"{_error.name}.{getattr(_error, 'name_from', '')}") from _error

__all__ = ["Carried", "Pipeline", "StageModule", "torch_schedule"]

# What is called or replaced below; a torch that lacks one would fail late or, worse, ignore what replaces it.
_PRIVATE: tuple[tuple[type, tuple[str, ...]], ...] = (
    (
        _PipelineScheduleRuntime,
        ("_prepare_schedule_with_comms", "_step_microbatches", "_initialize_stages", "_warmup_p2p")
        + ("_maybe_compute_loss", "_maybe_get_loss", "_update_losses"),
    ),
    (
        PipelineStage,
        ("get_fwd_send_ops", "get_bwd_send_ops", "clear_runtime_states", "has_backward", "perform_reduce_grad")
        + ("_retrieve_recv_activations", "_retrieve_recv_grads", "set_local_fwd_input", "set_local_bwd_input"),
    ),
    (_Action, ("from_str", "computation_type", "microbatch_index", "stage_index")),
    (_TensorMeta, ("from_tensor",)),
)


def _check_private() -> None:
    for kind, names in _PRIVATE:
        for name in names:
            if not hasattr(kind, name):
                raise _moved(f"{kind.__module__}.{kind.__name__}.{name}")


_check_private()


@dataclasses.dataclass(frozen=True)
class Carried:
    """What a stage hands to the next for one microbatch.

    >>> Carried.of(torch.zeros(2, 3)).shape
    (2, 3)

    Source: none; plain bookkeeping.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, tensor: Tensor) -> "Carried":
        """Of a tensor like the one that is handed on."""
        return cls(tuple(tensor.shape), tensor.dtype)

    def _word(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


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


def torch_schedule(name: str, *, ranks: int, microbatches: int, chunks: int | None = None) -> Schedule:
    """One of the seven schedules that come with torch, as its own engine plays it.

    Args:
        name: GPipe, 1F1B, Interleaved1F1B, LoopedBFS, InterleavedZeroBubble, ZBVZeroBubble or DualPipeV.
        ranks: P, devices in the pipeline.
        microbatches: M.
        chunks: stages on a device; None for 1, or 2 where the schedule needs several.

    Raises:
        UsageError: torch does not know it, or cannot make it for these numbers.

    >>> torch_schedule("1F1B", ranks=2, microbatches=2).stages
    2

    Source: ``torch.distributed.pipelining``.
    """
    try:
        rows = get_schedule_ops(name, ranks, microbatches, chunks)
    except (AssertionError, ValueError) as error:
        got = f"{name!r} with {ranks} ranks, {microbatches} microbatches, {chunks or 'the usual'} stages on each"
        allowed, fix = f"be one that torch can make ({error})", "see torch.distributed.pipelining's schedules"
        raise UsageError(word("the schedule", got=got, allowed=allowed, where=_WHERE, fix=fix)) from error
    orders = []
    for row in rows:
        order = [Action.parse(str(action)) for action in row if action and action.is_compute_op]
        # Torch 2.13 numbers the forwards of 1F1B's last rank from 1.
        late = name.lower() == "1f1b" and min(one.microbatch or 0 for one in order if one.kind == "F")
        orders.append(
            [one._replace(microbatch=(one.microbatch or 0) - late) if one.kind == "F" else one for one in order]
        )
    return Schedule.of(name, orders)


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
        made = [_Stage(module, s, schedule.stages, device, group=group) for s, module in self.stages.items()]
        self._stages = made
        self._runtime = _Runtime(
            cast(Any, made), schedule.microbatches, loss_fn=_unused, scale_grads=False, defer_pp_recv=not early
        )
        _lower(schedule, self._runtime)
        self._forward_only = _only_forward(self._runtime.pipeline_order_with_comms)
        self._agreed: tuple[int, ...] | None = None
        self._broken = False

    def step(self, microbatches: Sequence[Mapping[str, Any]]) -> dict[int, Tensor]:
        """Runs all microbatches forward and back.

        Args:
            microbatches: of each the keywords of every stage; the same on all ranks of the pipeline.

        Returns:
            The loss of each microbatch on the rank of the last stage, detached; elsewhere nothing.

        Raises:
            ShapeError: ranks disagree on the shapes; on all of them, before anything runs.
            UsageError: another number of microbatches than the schedule's; a step before failed; or a shared parameter
                still holds gradients.
        """
        held = [name for name, copies in self._copies().items() for p in copies.values() if p.grad is not None]
        problem = ""
        if held:
            allowed = "have no gradient before a step, whose copies' gradients are summed after it,"
            problem = word(held[0], got="one", allowed=allowed, where=_WHERE, fix="zero_grad(set_to_none=True) first")
        self._agree(microbatches, problem)
        self._play(microbatches)
        self._sum_shared()
        return {index: loss.detach() for index, loss in self._runtime.losses.items()}

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

    def _play(self, microbatches: Sequence[Mapping[str, Any]], *, back: bool = True) -> None:
        self._runtime.losses.clear()
        for stage in self._stages:
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
        told = {str(index): [one._word() for one in row] for index, row in mine.items()}
        text = json.dumps([told, problem, [_sizes(each) for each in microbatches]])
        digest = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
        words = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.schedule.ranks)]
        dist.all_gather(words, words[0].new_tensor([digest]), group=self.group)
        agreed = tuple(int(each) for each in words)
        if agreed == self._agreed:
            return
        said: list[Any] = [None] * self.schedule.ranks
        dist.all_gather_object(said, (problem, mine, [_sizes(each) for each in microbatches]), group=self.group)
        _refuse(said)
        handed = {index: row for _, rows, _ in said for index, row in rows.items()}
        if self._agreed is None:
            self._runtime._warmup_p2p(cast(Any, self._stages), True, False)
        for stage in self._stages:
            stage.prepare(handed.get(stage.stage_index - 1), handed.get(stage.stage_index), wanted)
        self._agreed = agreed

    # ---- parameters that several stages hold

    def _copies(self) -> dict[str, dict[int, nn.Parameter]]:
        """name -> stage -> this rank's copies, of those that are trained."""
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


def _lower(schedule: Schedule, runtime: Any) -> None:
    """Hands torch the orders, and lets it add the messages; where the orders say themselves when a stage's parameters
    are gathered and dropped, that is left as it is.
    """
    rows = {rank: [_Action.from_str(str(one)) for one in order] for rank, order in enumerate(schedule.actions)}
    if not schedule.count("UNSHARD"):
        runtime._prepare_schedule_with_comms(rows)
        return
    whole = {rank: _add_reduce_grad(cast(Any, row), schedule.microbatches) for rank, row in rows.items()}
    stages = schedule.rank_of_stage
    sent = _add_send_recv(cast(Any, whole), stage_to_rank=lambda s: stages[s], num_stages=len(stages))
    runtime._prepare_schedule_with_comms(sent, format="compute_comms")


def _local(gradient: Any) -> Tensor:
    """The part of a gradient that is on this device."""
    return gradient.to_local() if hasattr(gradient, "to_local") else gradient


def _sizes(microbatch: Mapping[str, Any]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in sorted(microbatch.items()) if isinstance(value, Tensor)}


def _refuse(said: Sequence[tuple[str, Any, Any]]) -> None:
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
        raise UsageError("; ".join(f"rank {ranks} of the pipeline: {text}" for text, ranks in problems.items()))
    first = said[0][2]
    for rank, (_, _, sizes) in enumerate(said):
        for index, (one, other) in enumerate(zip(first, sizes, strict=True)):
            if one != other:
                got = f"microbatch {index}: {one} on rank 0 of the pipeline, {other} on rank {rank}"
                allowed, fix = "have the same shapes on all ranks of a pipeline", "read the same batch on all of them"
                raise ShapeError(word("microbatches", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _unused(*_: Any) -> Tensor:
    raise AssertionError("the last stage computes the loss")


def _only_forward(rows: Mapping[int, Sequence[Any]]) -> dict[int, list[Any]]:
    """The forward actions and their messages in the same order; stages are unsharded once, all together."""
    kinds, kept = _ComputationType, {}
    for rank, row in rows.items():
        flat = [part for action in row for part in (action.sub_actions or (action,))]
        stages = sorted({each.stage_index for each in flat})
        kept[rank] = [_Action(s, kinds.UNSHARD) for s in stages]
        kept[rank] += [each for each in flat if each.computation_type in (kinds.FORWARD, kinds.SEND_F, kinds.RECV_F)]
        kept[rank] += [_Action(s, kinds.RESHARD) for s in stages]
    return kept


class _Runtime(_PipelineScheduleRuntime):
    """Torch's runtime with losses by microbatch, and stages that are told their shapes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: dict[int, Tensor] = {}

    def _initialize_stages(self, args: Any, kwargs: Any, target: Any = None, loss_kwargs: Any = None) -> None:
        """Nothing to do: ``_Stage.prepare`` was called."""

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: Any, mb_index: int, loss_kwargs: Any = None
    ) -> None:
        if stage.is_last:
            self.losses[mb_index] = output

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> Tensor | None:
        return self.losses[mb_index] if stage.is_last else None

    def _update_losses(self, stages: Any, losses: Any) -> None:
        """They are read from ``losses``."""


class _Stage(PipelineStage):
    """Torch's stage, told what travels in each microbatch instead of trying it out on the first."""

    def prepare(self, takes: Sequence[Carried] | None, gives: Sequence[Carried] | None, count: int) -> None:
        """Makes room for what arrives: from the stage before, and from the one after, its gradients."""
        before, after = self.stage_index - 1, self.stage_index + 1
        self.chunks = count
        self._takes = None if takes is None else [_meta(each) for each in takes]
        self.act_send_info = {0: [] if gives is None else [after]}
        self.grad_send_info = [] if takes is None else [before]
        for index in range(count):
            self.args_recv_info[index] = () if takes is None else (self._room(takes[index], before),)
            self.grad_recv_info[index] = () if gives is None else (self._room(gives[index], after),)
        self._of(0)

    def _room(self, carried: Carried, source: int) -> Any:
        buffer = torch.empty(carried.shape, dtype=carried.dtype, device=self.device)
        return _RecvInfo(f"from stage {source}", source, buffer, tensor_meta=_meta(carried))

    def _of(self, index: int) -> None:
        """Torch knows one shape for all microbatches: it is given that of the one at hand."""
        metas = () if self._takes is None else (self._takes[index],)
        self._stage_meta.inputs = self._stage_meta.input_grads = metas

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's; gloo sends contiguous tensors alone, and the shape is held against what was agreed."""
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        for each in operations:
            meta = self.grad_recv_info[fwd_chunk_id][0].tensor_meta
            _expect(each.tensor, meta, f"stage {self.stage_index} carries")
            each.tensor = each.tensor.contiguous()
        return operations

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """As torch's, for this microbatch's shape."""
        self._of(bwd_chunk_id)
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        for each in operations:
            each.tensor = each.tensor.contiguous()
        return operations


def _meta(carried: Carried) -> _TensorMeta:
    return _TensorMeta.from_tensor(torch.empty(carried.shape, dtype=carried.dtype, device="meta", requires_grad=True))


def _expect(tensor: Tensor, meta: Any, who: str) -> None:
    """Raises where a stage hands on something else than it said.

    Raises:
        ShapeError: another shape or dtype.
    """
    if tuple(tensor.shape) != tuple(meta.shape) or tensor.dtype != meta.dtype:
        got, allowed = f"{tuple(tensor.shape)} {tensor.dtype}", f"be {tuple(meta.shape)} {meta.dtype}, as it said"
        raise ShapeError(word(f"what {who}", got=got, allowed=allowed, where=_WHERE, fix="mend its carries()"))
