"""Torch's pipelining under names of our own: the one file that knows the private ones (written for torch 2.13).

Torch's runtime takes any order of forward, dInput and dWeight actions, and adds the messages itself. What is different
here: stages are told which shapes travel instead of trying the first microbatch, so that a step may be shaped as none
before it (torch's own answer to that is an abort of the process) and microbatches of one step may differ; and losses
are told apart by their microbatch, so that the last stage may take them in any order.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from turnout.errors import MissingExtraError, ShapeError, UsageError, word
from turnout.types.schedule import Action, Schedule

_WHERE = "turnout.run.ranks.torch_pipeline"


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

__all__ = [
    "Carried",
    "Runtime",
    "Stage",
    "drop_forwards",
    "lower",
    "only_forward",
    "split_before_backward",
    "torch_schedule",
    "unused",
]

# What is called or replaced below; a torch that lacks one would fail late or, worse, ignore what replaces it.
_PRIVATE: tuple[tuple[type, str], ...] = (
    (_PipelineScheduleRuntime, "_prepare_schedule_with_comms _step_microbatches _initialize_stages _warmup_p2p"),
    (_PipelineScheduleRuntime, "_maybe_compute_loss _maybe_get_loss _update_losses"),
    (PipelineStage, "get_fwd_send_ops get_bwd_send_ops clear_runtime_states has_backward perform_reduce_grad"),
    (PipelineStage, "_retrieve_recv_activations _retrieve_recv_grads set_local_fwd_input set_local_bwd_input"),
    (_Action, "from_str computation_type microbatch_index stage_index sub_actions"),
    (_TensorMeta, "from_tensor"),
)


def _check_private() -> None:
    for kind, names in _PRIVATE:
        for name in names.split():
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

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


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


def lower(schedule: Schedule, runtime: Any) -> None:
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


def unused(*_: Any) -> Tensor:
    """Stands where torch wants a loss function; the last stage gives the loss itself."""
    raise AssertionError("the last stage computes the loss")


def only_forward(rows: Mapping[int, Sequence[Any]]) -> dict[int, list[Any]]:
    """The forward actions and their messages in the same order; stages are unsharded once, all together."""
    kinds, kept = _ComputationType, {}
    for rank, row in rows.items():
        flat = [part for action in row for part in (action.sub_actions or (action,))]
        stages = sorted({each.stage_index for each in flat})
        kept[rank] = [_Action(s, kinds.UNSHARD) for s in stages]
        kept[rank] += [each for each in flat if each.computation_type in (kinds.FORWARD, kinds.SEND_F, kinds.RECV_F)]
        kept[rank] += [_Action(s, kinds.RESHARD) for s in stages]
    return kept


def split_before_backward(rows: Mapping[int, Sequence[Any]]) -> tuple[dict[int, list[Any]], dict[int, list[Any]]]:
    """Each rank's forward actions that go before anything of a backward pass, and what comes after them.

    A rank's first backward pass needs one of every rank that holds a later stage than all of its own; so ranks come to
    this point in the order of the last stage that each holds, the last first, without each other's backward passes.
    """
    kinds = _ComputationType
    before: dict[int, list[Any]] = {}
    after: dict[int, list[Any]] = {}
    ahead = (kinds.FORWARD, kinds.SEND_F, kinds.RECV_F, kinds.UNSHARD, kinds.RESHARD)
    for rank, row in rows.items():
        cut = next(place for place, action in enumerate(row) if action.computation_type not in ahead)
        first, rest = list(row[:cut]), list(row[cut:])
        for place in range(len(first) - 1, -1, -1):  # what is gathered ahead for the rest belongs to it
            stage, kind = first[place].stage_index, first[place].computation_type
            used = any(
                later.stage_index == stage and later.computation_type == kinds.FORWARD for later in first[place:]
            )
            if kind == kinds.UNSHARD and not used:
                rest.insert(0, first.pop(place))
        before[rank], after[rank] = first, rest
    return before, after


def drop_forwards(runtime: Any, first: Mapping[int, Sequence[Any]]) -> None:
    """Forgets what ``first`` of ``split_before_backward`` did: takes in, unread, what others sent in theirs."""
    kinds, stages = _ComputationType, {stage.stage_index: stage for stage in runtime._stages}
    mine = {(a.stage_index, a.microbatch_index) for a in first[runtime.rank] if a.computation_type == kinds.RECV_F}
    for works in runtime.fwd_recv_ops.values():
        for work in works:
            work.wait()
    runtime.fwd_recv_ops.clear()
    for rank in sorted(first):
        for action in first[rank]:
            to = (action.stage_index + 1, action.microbatch_index)
            if action.computation_type == kinds.SEND_F and to[0] in stages and to not in mine:
                for operation in stages[to[0]].get_fwd_recv_ops(to[1]):
                    operation.op(operation.tensor, group=operation.group, group_src=operation.group_peer).wait()
    for stage in runtime._stages:
        for module in stage.submod.modules() if stage.stage_index in runtime.unsharded_stages else ():
            if isinstance(module, FSDPModule):
                module.reshard()
    runtime.unsharded_stages.clear()


class Runtime(_PipelineScheduleRuntime):
    """Torch's runtime with losses by microbatch, and stages that are told their shapes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: dict[int, Tensor] = {}

    def _initialize_stages(self, args: Any, kwargs: Any, target: Any = None, loss_kwargs: Any = None) -> None:
        """Nothing to do: ``Stage.prepare`` was called."""

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: Any, mb_index: int, loss_kwargs: Any = None
    ) -> None:
        if stage.is_last:
            self.losses[mb_index] = output

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> Tensor | None:
        return self.losses[mb_index] if stage.is_last else None

    def _update_losses(self, stages: Any, losses: Any) -> None:
        """They are read from ``losses``."""


class Stage(PipelineStage):
    """Torch's stage, told what travels in each microbatch instead of trying it out on the first.

    Attributes:
        later: where messages go that nobody waits for before all of a step is done; None to wait as torch does.
    """

    later: list[Any] | None = None

    def prepare(self, takes: Sequence[Carried] | None, gives: Sequence[Carried] | None, count: int) -> None:
        """Makes room for what arrives: from the stage before, and from the one after, its gradients."""
        if isinstance(self.submod, FSDPModule):
            # The schedule says when a stage is gathered and dropped. Parts that drop themselves after each forward pass
            # are not there when torch looks for the weights of I and W, and go without a gradient.
            self.submod.set_reshard_after_forward(False)
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
        if self.later is None:
            return operations
        for each in operations:
            self.later.append(each.op(each.tensor, group=each.group, group_dst=each.group_peer, tag=each.tag))
        return []

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
