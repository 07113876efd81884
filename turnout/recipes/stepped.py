"""One step of training, in one process and under a plan: what is compared to know that they are the same."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from turnout.models import LM
from turnout.models.fused import IGNORE
from turnout.models.overlapped import Overlapped
from turnout.models.piped import Piped
from turnout.recipes.played import played
from turnout.run.ranks.shard import Meshes, accumulate, shard
from turnout.run.ranks.whole import gradient_norm, settle, whole, whole_gradients
from turnout.types.plan import Plan

__all__ = ["Batch", "Stepped", "alone", "batch_for", "together"]

_LR, _SEQ = 1.0, 12
Touch = Callable[[nn.Module, Meshes], None]
Play = Callable[[Overlapped], None]


@dataclasses.dataclass(frozen=True, eq=False)
class Stepped:
    """What there is after a step of gradient descent.

    Args:
        numbers: the "loss", and the "norm" of all gradients.
        gradient: name and gradient of every parameter; a name twice where several stages hold a copy.
        weight: name and value.

    Source: none; plain bookkeeping.
    """

    numbers: Mapping[str, float]
    gradient: Sequence[tuple[str, Tensor | None]]
    weight: Sequence[tuple[str, Tensor]]


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
    """Rows of tokens, and which of them are targets: others in every row, so that processes have unlike many.

    Args:
        id_BS: (B, S).
        target_BS: (B, S), -100 for none.

    Source: none; plain bookkeeping.
    """

    id_BS: Tensor
    target_BS: Tensor

    @property
    def tokens(self) -> int:
        """How many targets there are."""
        return int((self.target_BS != IGNORE).sum())

    def part(self, number: int, parts: int) -> "Batch":
        """One of so many equal parts."""
        return Batch(self.id_BS.chunk(parts)[number], self.target_BS.chunk(parts)[number])


def batch_for(lm: LM, plan: Plan, seed: int) -> Batch:
    """Two random rows for each micro-batch of each process.

    Args:
        lm: whose vocabulary they are of.
        plan: that they are for.
        seed: of the chance.

    Source: none; a test's input.
    """
    # Of what a schedule cuts into chunks, so many rows that they do not come out even.
    each = 2 if plan.overlap is None else 1 + max(plan.overlap.attention_chunks, plan.overlap.expert_chunks)
    rows = each * plan.layout.data_ranks * plan.microbatches
    chance = torch.Generator().manual_seed(seed + 1)
    length = min(_SEQ, lm.config.max_seq)
    id_BS = torch.randint(lm.config.vocab_size, (rows, length + 1), generator=chance)
    target_BS = id_BS[:, 1:].clone()
    for row in range(rows):
        target_BS[row, : row * length // (2 * rows)] = IGNORE
    return Batch(id_BS[:, :-1], target_BS)


def alone(lm: LM, batch: Batch, plan: Plan) -> Stepped:
    """The step in one process.

    Args:
        lm: used up.
        batch: all of it.
        plan: that it stands beside; parameters that travel in bf16 are in bf16 here.

    Source: none; plain gradient descent.
    """
    start = {name: p.detach().clone() for name, p in lm.named_parameters()}
    if plan.gather == "bf16":  # as it arrives
        for parameter in lm.parameters():
            parameter.data = parameter.data.bfloat16()
    loss = lm.loss(batch.id_BS, batch.target_BS).nats / batch.tokens
    loss.backward()
    grads = {name: None if p.grad is None else p.grad.to(start[name].dtype) for name, p in lm.named_parameters()}
    norm = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads.values() if grad is not None))
    stepped = {name: w if (grad := grads[name]) is None else w - _LR * grad for name, w in start.items()}
    return Stepped({"loss": float(loss.detach()), "norm": norm}, list(grads.items()), list(stepped.items()))


def together(lm: LM, batch: Batch, plan: Plan, meshes: Meshes, *, before: Touch, play: Play, after: Touch) -> Stepped:
    """The step under the plan; all its processes call it, and the first gets everything.

    Args:
        lm: the same on all; used up.
        batch: all of it, on all.
        plan: the plan.
        meshes: of its layout.
        before: what happens to the model once it is spread.
        play: what happens in its place to the player of the plan's block schedule, where it has one.
        after: what happens to it after the backward pass.

    Raises:
        UsageError: the plan's pipeline does not fit the model.

    Source: none; the parts of ``turnout.run``.
    """
    own = batch.part(meshes.data_rank, plan.layout.data_ranks)
    parts = [own.part(number, plan.microbatches) for number in range(plan.microbatches)]
    loss, again = torch.zeros((), dtype=torch.float64), set[str]()
    if plan.overlap is not None:
        model, stages = lm, [lm]
        loss += played(lm, parts, batch.tokens, plan, meshes, play)
    elif plan.layout.pp > 1:
        model = Piped(lm, plan, meshes)
        stages, again = list(model.stages.values()), model.again
        before(model, meshes)
        keywords = [{"id_BS": p.id_BS, "target_BS": p.target_BS, "predicted": batch.tokens} for p in parts]
        for nats in model.step(keywords).values():
            loss += nats.double()
    else:
        model = shard(lm, plan.layout, meshes, plan=plan)
        stages = [model]
        before(model, meshes)
        for number, part in enumerate(parts):
            accumulate(lm, plan.layout, last=number == len(parts) - 1)
            nats = lm.loss(part.id_BS, part.target_BS).nats / batch.tokens
            nats.backward()
            loss += nats.detach().double()
    after(model, meshes)
    dist.all_reduce(loss)
    numbers = {"loss": float(loss), "norm": float(gradient_norm(model, meshes, skip=again))}
    gradients = [pair for stage in stages for pair in whole_gradients(stage)]
    settle(model)
    torch.optim.SGD(model.parameters(), lr=_LR).step()
    weights = [pair for stage in stages for pair in whole(stage, dict(stage.named_parameters()))]
    if plan.layout.pp > 1:  # what the first process has no part in
        kept = (gradients, weights) if meshes.data_rank == 0 else ([], [])
        found: list[Any] = [None] * dist.get_world_size()
        dist.gather_object(kept, found if dist.get_rank() == 0 else None)
        if dist.get_rank() == 0:
            gradients, weights = ([pair for one in found for pair in one[kind]] for kind in (0, 1))
    return Stepped(numbers, gradients, weights)
