"""Processes that share every batch and play each block's tasks by a schedule: another team of the training loop."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from turnout.measure.simulate_block import BlockTimes
from turnout.models.overlapped import Overlapped
from turnout.run.ranks.exchange import own_part
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import Meshes
from turnout.train.objective import objective
from turnout.train.sharded import Sharded
from turnout.train.team import Passed, Weights
from turnout.types import BlockSchedule, Routing

__all__ = ["Overlapping"]


class Overlapping(Sharded):
    """A ``Team`` of many processes whose forward and backward passes, and sums of gradients, a schedule orders.

    Everything but experts is whole on each process. Of experts each has its own, as its part of tensors that the
    group shares: so checkpoints and evaluations are those of ``Sharded``, and what is played and updated is that part.

    Args:
        ranks: from ``turnout.run.ranks.processes.start``.
        meshes: from ``turnout.run.ranks.shard.mesh``.
        model: what ``turnout.run.ranks.shard.shard`` gave under a plan that has the schedule.
        schedule: of as many blocks.

    Raises:
        UsageError: a model or a schedule that is not played.

    Source: Gao et al., 2025, "FlowMoE", for the schedule of whole blocks.
    """

    @property
    def schedules(self) -> bool:
        """It does."""
        return True

    def __init__(self, ranks: Ranks, meshes: Meshes, model: Any, schedule: BlockSchedule) -> None:
        super().__init__(ranks, meshes, model)
        self._times: list[BlockTimes] = []
        self._sums: tuple[int, float, float] = (0, 0.0, 0.0)  # passes, seconds and shares hidden, of all that was read
        copies = meshes.experts["dp_replicate"].get_group()
        groups = {"data": meshes.data_group if self.size > 1 else None, "copies": copies if copies.size() > 1 else None}
        self.overlapped = Overlapped(model, schedule, group=meshes.expert_group, **groups, held=self.held)

    def leaf(self, name: str, parameter: nn.Parameter) -> nn.Parameter:
        """This process's own experts; anything else is whole, and itself."""
        own = own_part(parameter.detach())
        is_part = own.data_ptr() != parameter.data_ptr() or type(parameter) is not nn.Parameter
        return nn.Parameter(own, requires_grad=parameter.requires_grad) if is_part else parameter

    def passed(
        self, id_BS: Tensor, target_BS: Tensor, real_BS: Tensor | None, weights: Weights, *, tokens: int, seed: int
    ) -> Passed:
        """Plays the blocks of these rows; what the tasks took is kept for ``pace``."""
        found: list[Passed] = []

        def counted(nats: Tensor, routings: Sequence[Routing]) -> Tensor:
            # No router that this plays has a penalty.
            loss, done = objective(nats, routings, self.wholes(routings), weights)
            found.append(done)
            return loss

        how = {"tokens": weights.predicted, "attention_mask": real_BS, "objective": counted}
        with torch.autocast(id_BS.device.type, dtype=torch.bfloat16, enabled=weights.bf16):
            times = self.overlapped.step(id_BS, target_BS, **how).times
        first = min(start for start, _ in times.values())
        spans = sorted(
            ((task, start - first, end - first) for task, (start, end) in times.items()), key=lambda s: s[1:]
        )
        self._times.append(BlockTimes(tuple(spans), spans[-1][2], 0.0, 0.0))
        (done,) = found  # all rows at once: no other schedule is played with an objective
        return done

    def passing(self, *, last: bool) -> None:
        """Nothing: gradients travel as the schedule says."""

    def collect(self, parameters: Any) -> None:
        """Nothing: gradients are where they belong."""

    def pace(self) -> Mapping[str, float]:
        """Mean seconds of a pass through the blocks and back, sums of gradients included, and what share was hidden."""
        found, self._times = self._times, []
        if not found:
            return {}
        passes, seconds, hidden = len(found), sum(t.makespan_s for t in found), sum(t.hidden for t in found)
        self._sums = self._sums[0] + passes, self._sums[1] + seconds, self._sums[2] + hidden
        return {"pass_s": seconds / passes, "hidden": hidden / passes}

    @property
    def means(self) -> tuple[float, float] | None:
        """What ``pace`` said, over all of it; None before it was asked."""
        count, seconds, hidden = self._sums
        return (seconds / count, hidden / count) if count else None

    def close(self) -> None:
        """Ends the wire's thread."""
        self.overlapped.close()
