"""Plays a schedule of sparse transformer blocks on torch's process groups, with the gradients of one process."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.run.blocks.block_gradients import BlockGradients
from turnout.run.blocks.block_parts import BlockParts
from turnout.run.blocks.block_pass import BlockPass, Loss
from turnout.run.blocks.wire import Board, Job, Slow, Wire
from turnout.types import BlockSchedule, BlockTask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["BlockPlayer", "Played"]

_WHERE = "turnout.run.BlockPlayer"
Place = tuple[int, int]  # a block, and a chunk or piece of it


@dataclasses.dataclass(frozen=True, eq=False)
class Played:
    """What one step gave, beside the gradients that are in the parameters' ``grad``.

    Args:
        loss: this rank's part of it.
        slope_BSD: the gradient of what went into the first block.
        times: when each task began and ended here, in seconds of one clock.
        seconds: from the first task's beginning to the last one's end.

    Source: none; plain bookkeeping.
    """

    loss: Tensor
    slope_BSD: Tensor
    times: Mapping[BlockTask, tuple[float, float]]

    @property
    def seconds(self) -> float:
        """How long the step took here."""
        return max(end for _, end in self.times.values()) - min(start for start, _ in self.times.values())


class BlockPlayer:
    """Runs forward and backward pass of sparse blocks, and the sums of their gradients, in the order of a schedule.

    Chip and wire each do their own tasks one after another, in the schedule's order, and wait for each other where a
    task needs another's; so what is on the wire is hidden behind what computes. All collectives of these groups are
    issued by one thread, in an order that is the same on every rank: ranks compare their schedules before they begin.

    Gradients are sums over ranks: the loss is divided by the number of all ranks' tokens before it comes here.

    Args:
        schedule: of as many blocks, over pieces of their gradients' sizes.
        parts: the blocks, as this rank has them.
        group: the ranks that share the experts: expert e is with rank e // (E / G).
        data: the ranks over which what every rank has is summed; None where there are no others.
        copies: the ranks that hold the same experts, over which theirs are summed; None where there are no others.
        slow: how much longer tasks take than they do, by kind and tokens, and ``wire`` by bytes; for trials.

    Raises:
        UsageError: a schedule that does not fit the blocks, that ranks have different ones of, or of a sort that is not
            played: parts of the sequence, a wire inside the node, reductions carried into the next step.

    Source: Gao et al., 2025, "FlowMoE", for what is scheduled. Its released code sums the gradient of each attention's
        input in place of its parameters', and starts collectives from many threads; here neither is so.
    """

    def __init__(
        self,
        schedule: BlockSchedule,
        parts: Sequence[BlockParts],
        *,
        group: "ProcessGroup",
        data: "ProcessGroup | None" = None,
        copies: "ProcessGroup | None" = None,
        slow: Mapping[str, Slow] | None = None,
    ) -> None:
        from turnout.run.ranks.processes import agree

        agree("the schedule of blocks", schedule.digest, fix="plan on one rank, and give its schedule to all")
        self.schedule, self.parts, self.slow = schedule, tuple(parts), dict(slow or {})
        self._group, self._data, self._copies = group, data, copies
        self._check()
        schedule.check()
        self._needs = schedule.needs()
        self._turns = self._turned()
        self._wire = Wire(slow=self.slow.get("wire"))
        self._gradients()  # does it fit?

    def _check(self) -> None:
        schedule = self.schedule
        unplayed = {
            "cut='sequence'": (schedule.cut != "batch", "plan with costs of cut='batch'"),
            "a wire inside the node": (bool(schedule.inner), "plan with costs of one wire"),
            "carried reductions": (bool(schedule.carried), "plan without them"),
        }
        for what, (there, fix) in unplayed.items():
            if there:
                allowed = "be of a sort that is played (cut='batch', one wire, reductions that end with their step)"
                raise UsageError(word("the schedule", got=what, allowed=allowed, where=_WHERE, fix=fix))
        if len(self.parts) != schedule.blocks:
            fix = f"plan for {len(self.parts)} blocks"
            allowed = f"be as many as the schedule's {schedule.blocks}"
            raise UsageError(word("blocks", got=len(self.parts), allowed=allowed, where=_WHERE, fix=fix))
        experts, ranks = self.parts[0].num_experts, self._group.size()
        if experts % ranks:
            fix = "let as many ranks share them as divide them (ep)"
            allowed = f"divide {experts} experts"
            raise UsageError(word("the ranks", got=ranks, allowed=allowed, where=_WHERE, fix=fix))
        unsummed = {
            "dense_bytes": (self._data, schedule.dense_bytes, any(p.dense for p in self.parts)),
            "expert_bytes": (self._copies, schedule.expert_bytes, any(p.expert for p in self.parts)),
        }
        for what, (ranks_of, sizes, there) in unsummed.items():
            if there and bool(sizes) != (ranks_of is not None and ranks_of.size() > 1):
                several = f"{1 if ranks_of is None else ranks_of.size()} ranks"
                allowed = (
                    f"be pieces of the gradient where several ranks sum it, and none where one has it; here {several}"
                )
                raise UsageError(word(what, got=sizes, allowed=allowed, where=_WHERE, fix=f"plan with its {what}"))

    def _gradients(self) -> tuple[list[BlockGradients], list[BlockGradients]]:
        schedule = self.schedule
        dense = [BlockGradients(p.dense, schedule.dense_bytes, f"block {n}") for n, p in enumerate(self.parts)]
        expert = [
            BlockGradients(p.expert, schedule.expert_bytes, f"the experts of block {n}")
            for n, p in enumerate(self.parts)
        ]
        return dense, expert

    def _turned(self) -> list[tuple[int, ...]]:
        """The chunks of the last block whose loss is taken together, in the order that the wire waits for them."""
        schedule, last = self.schedule, self.schedule.blocks - 1
        if schedule.turn == "whole":
            return [tuple(range(schedule.expert_chunks))]
        return [(one.chunk,) for one in schedule.wire if one.kind == "C'" and one.block == last]

    def step(self, x_BSD: Tensor, loss: Loss, about: Any = None) -> Played:
        """One step: the gradients of the parameters are added to their ``grad``, summed over ranks.

        Args:
            x_BSD: this rank's sequences, as they go into the first block; there may be fewer than chunks.
            loss: called with (what came out of the last block for some sequences, which, each block's gates): for all
                of them at once, or for each chunk where the schedule turns by chunk, and then without gates. What it
                gives are summed; gradients of what else it uses are added up as torch does.
            about: what the parts want to know of the batch.

        Returns:
            The loss, the gradient of x, and when each task ran.

        Raises:
            UsageError: x is on an accelerator, or autocast is on.
        """
        import torch.distributed as dist

        if x_BSD.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            got = "autocast" if x_BSD.device.type == "cpu" else f"x on {x_BSD.device}"
            allowed, fix = (
                "be played on CPUs, without autocast: elsewhere it was never seen to be right",
                "use gloo ranks",
            )
            raise UsageError(word("blocks", got=got, allowed=allowed, where=_WHERE, fix=fix))
        dense, expert = self._gradients()
        done = BlockPass(
            self.schedule,
            self.parts,
            dense,
            expert,
            ranks=dist.get_world_size(self._group),
            x_BSD=x_BSD.detach(),
            about=about,
            loss=loss,
        )
        board = Board()
        playing = self._wire.play([self._job(task, done) for task in self.schedule.wire], board)
        try:
            self._compute(done, board)
        except BaseException as error:
            board.fail(error)
            raise
        playing.result()
        for each in (*dense, *expert):
            each.give()
        times = {task: span for task, span in board.times.items() if isinstance(task, BlockTask)}
        return Played(torch.stack(done.losses).sum(), done.slope_BSD, times)

    def _compute(self, done: BlockPass, board: Board) -> None:
        """What the chip does, in this thread; the turn from forward to backward as soon as what it needs is there."""
        last, turns = self.schedule.blocks - 1, list(self._turns)

        def turn() -> None:
            chunks = turns.pop(0)
            board.run(("turn", *chunks), _combined(last, chunks), lambda: done.turn(chunks))

        for task in self.schedule.compute:
            while task.block == last and task.kind in ("E'", "Ex") and any(task.chunk in chunks for chunks in turns):
                turn()
            while turns and not board.is_done(self._needs[task]):
                board.wait_either(self._needs[task], _combined(last, turns[0]))
                if not board.is_done(_combined(last, turns[0])):
                    break
                turn()
            board.run(task, self._needs[task], lambda task=task: self._do(task, done))

    def _do(self, task: BlockTask, done: BlockPass) -> None:
        done.work[task.kind](task.block, task.chunk)
        if task.kind in self.slow:
            self.slow[task.kind].sleep(done.tokens(task))

    # ---- the wire

    def _job(self, task: BlockTask, done: BlockPass) -> Job:
        needs: tuple[object, ...] = self._needs[task]
        if task.kind == "C'" and task.block == self.schedule.blocks - 1:
            needs = next(("turn", *chunks) for chunks in self._turns if task.chunk in chunks), *needs
        work = {"D": self._dispatch, "C": self._combine, "C'": self._uncombine, "D'": self._undispatch}
        work |= {"Ra": self._reduce_dense, "Re": self._reduce_experts}
        return task, needs, lambda: work[task.kind](done, (task.block, task.chunk))

    def _dispatch(self, done: BlockPass, at: Place) -> int:
        import torch.distributed as dist

        packed = done.packed[at]
        received_GE = torch.empty_like(packed.count_GE)
        dist.all_to_all_single(received_GE, packed.count_GE, group=self._group)
        done.count_GE[at] = received_GE
        done.received[at] = row = self._swap(packed.row_RD, packed.count_GE, received_GE)
        return _most(packed.row_RD, row)

    def _combine(self, done: BlockPass, at: Place) -> int:
        made = done.made.pop(at)
        done.returned[at] = row = self._swap(made, done.count_GE[at], done.packed[at].count_GE)
        return _most(made, row)

    def _uncombine(self, done: BlockPass, at: Place) -> int:
        slope = done.returned_slopes.pop(at)
        done.made_slopes[at] = row = self._swap(slope, done.packed[at].count_GE, done.count_GE[at])
        return _most(slope, row)

    def _undispatch(self, done: BlockPass, at: Place) -> int:
        slope = done.received_slopes.pop(at)
        done.row_slopes[at] = row = self._swap(slope, done.count_GE[at], done.packed[at].count_GE)
        return _most(slope, row)

    def _swap(self, row: Tensor, sent_GE: Tensor, received_GE: Tensor) -> Tensor:
        """The rows that come from each rank, for those that go to each."""
        import torch.distributed as dist

        sent, received = sent_GE.sum(1).tolist(), received_GE.sum(1).tolist()
        found = row.new_empty(sum(received), *row.shape[1:])
        dist.all_to_all_single(found, row.contiguous(), received, sent, group=self._group)
        return found

    def _reduce_dense(self, done: BlockPass, at: Place) -> int:
        return _reduced(done.dense[at[0]].piece(at[1]), self._data)

    def _reduce_experts(self, done: BlockPass, at: Place) -> int:
        return _reduced(done.expert[at[0]].piece(at[1]), self._copies)

    def close(self) -> None:
        """Ends the wire's thread."""
        self._wire.close()


def _combined(block: int, chunks: Sequence[int]) -> list[BlockTask]:
    return [BlockTask("C", block, chunk) for chunk in chunks]


def _reduced(piece: Tensor, group: "ProcessGroup | None") -> int:
    import torch.distributed as dist

    if piece.numel():
        dist.all_reduce(piece, group=group)
    return piece.numel() * piece.element_size()


def _most(sent: Tensor, received: Tensor) -> int:
    return max(sent.numel(), received.numel()) * sent.element_size()
