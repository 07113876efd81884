"""Offload: how many blocks a device holds, how far ahead they are fetched, and which of them are kept on disk."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence

from turnout.errors import UsageError, word
from turnout.solve.paging import paging
from turnout.solve.timeline import Timeline, timeline
from turnout.types import Cluster, OffloadPlan, Workload

__all__ = ["BlockLoad", "Foreseen", "block_loads", "foresee", "offload"]

_WHERE = "turnout.decide.device.offload"
LANES = ("compute", "up", "down", "host", "read", "write")
_AHEAD = 4  # blocks; what further ones would wait for is the way's width, not its length
_UNDER_WAY = 2  # blocks whose gradients or steps are under way, as ``turnout.run.swap.offload`` lets there be


@dataclasses.dataclass(frozen=True)
class BlockLoad:
    """What a block of a network is for those that move it.

    Args:
        parameter_bytes: of its parameters, on the device, on the host and on the way.
        gradient_bytes: of their gradients.
        state_bytes: of what the optimizer keeps for them.
        forward_s: of its forward pass on the device.
        backward_s: of its backward pass.
        step_s: of its optimizer step on the host.

    >>> BlockLoad(4.0, 4.0, 8.0, 1.0, 2.0, 0.5).parameter_bytes
    4.0

    Source: none; plain bookkeeping.
    """

    parameter_bytes: float
    gradient_bytes: float
    state_bytes: float
    forward_s: float
    backward_s: float
    step_s: float


@dataclasses.dataclass(frozen=True)
class Foreseen:
    """A plan with what is foreseen of it.

    Args:
        plan: the plan.
        step_s: of a training step, or of a forward pass.
        parameter_bytes: of blocks on the device, at most.
        device_bytes: with the blocks' gradients there.
        host_bytes: at most, in the host's memory.
        disk_bytes: on disk.
        busy: way -> the seconds that it is in use.
        played: the timeline.

    >>> block = BlockLoad(1.0, 1.0, 2.0, forward_s=1.0, backward_s=2.0, step_s=0.5)
    >>> foresee([block] * 4, Cluster(host_bytes_per_s=0.25), OffloadPlan(2, 1)).binds
    'up'

    Source: none; plain bookkeeping.
    """

    plan: OffloadPlan
    step_s: float
    parameter_bytes: float
    device_bytes: float
    host_bytes: float
    disk_bytes: float
    busy: Mapping[str, float]
    played: Timeline

    @property
    def binds(self) -> str:
        """The way that is in use longest."""
        return max(self.busy, key=lambda name: self.busy[name])


def block_loads(workload: Workload, cluster: Cluster, *, stepped_per_s: float = 1e9) -> tuple[BlockLoad, ...]:
    """What the blocks of a network are on one device of a cluster.

    Args:
        workload: the network; one device takes the whole batch.
        cluster: for its device's speed.
        stepped_per_s: parameters that the host's optimizer steps in a second; measure it.

    >>> from turnout.types import BlockSize
    >>> network = Workload((BlockSize(10, 20.0, 1.0),), width=2, seq=3, batch=1)
    >>> (found,) = block_loads(network, Cluster(flops_per_s=60.0))
    >>> found.parameter_bytes, found.state_bytes, found.forward_s, found.backward_s
    (20.0, 120.0, 1.0, 2.0)

    Source: none; plain bookkeeping.
    """
    loads = []
    for block in workload.blocks:
        forward_s = workload.tokens * block.all_flops / cluster.flops_per_s
        size = block.total
        loads.append(
            BlockLoad(
                parameter_bytes=size * workload.param_bytes,
                gradient_bytes=size * workload.grad_bytes,
                state_bytes=size * workload.optimizer_bytes,
                forward_s=forward_s,
                backward_s=2 * forward_s,
                step_s=size / stepped_per_s,
            )
        )
    return tuple(loads)


def foresee(blocks: Sequence[BlockLoad], cluster: Cluster, plan: OffloadPlan, *, training: bool = True) -> Foreseen:
    """Plays a step of a plan as ``turnout.run.swap`` does, on six ways: compute, up, down, host, read and write.

    Args:
        blocks: from the first to the last.
        cluster: for the widths of its ways; one of its devices is looked at.
        plan: what is where.
        training: a step of training rather than a forward pass.

    Raises:
        UsageError: a plan for other blocks.

    >>> block = BlockLoad(1.0, 1.0, 2.0, forward_s=1.0, backward_s=2.0, step_s=0.5)
    >>> ways = Cluster(host_bytes_per_s=1.0)
    >>> [foresee([block] * 4, ways, OffloadPlan(2, ahead)).step_s for ahead in (0, 1)]
    [19.5, 14.5]

    Source: Liao et al., 2024, "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU"
    (Fuyou), whose swaps of activations are left out.
    """
    plan.check(len(blocks), where=_WHERE)
    play = _Play(blocks, cluster, plan, training=training)
    played = timeline(list(play.order.values()), play.seconds, play.needs)
    busy = {name: sum(play.seconds[task] for task in order) for name, order in play.order.items()}
    parameters = max(sum(blocks[block].parameter_bytes for block in turn.held) for turn in play.turns)
    gradients = max(block.gradient_bytes for block in blocks) * (1 + _UNDER_WAY) if training else 0.0
    disk = sum(blocks[block].parameter_bytes + blocks[block].state_bytes for block in plan.on_disk)
    host = _host(blocks, plan, training=training)
    return Foreseen(plan, played.makespan, parameters, parameters + gradients, host, disk, busy, played)


def _host(blocks: Sequence[BlockLoad], plan: OffloadPlan, *, training: bool) -> float:
    """What stays there, and the most that is there on its way."""
    away = set(plan.on_disk)
    stays = sum(one.parameter_bytes + one.state_bytes for at, one in enumerate(blocks) if at not in away)
    on_way = (1 + plan.prefetch) * max((blocks[at].parameter_bytes for at in away), default=0.0)
    if not training:
        return stays + on_way
    stepped = max((blocks[at].parameter_bytes + blocks[at].state_bytes for at in away), default=0.0)
    each = [one.gradient_bytes for one in blocks]
    gradients = _UNDER_WAY * max(each) if plan.overlap else sum(each)
    return stays + on_way + stepped * (_UNDER_WAY if plan.overlap else len(away)) + gradients


class _Play:
    """The tasks of a step, in the order in which each way is told them."""

    def __init__(self, blocks: Sequence[BlockLoad], cluster: Cluster, plan: OffloadPlan, *, training: bool) -> None:
        self.blocks, self.cluster, self.away = blocks, cluster, set(plan.on_disk)
        self.seconds: list[float] = []
        self.needs: list[list[tuple[int, float]]] = []
        self.order: dict[str, list[int]] = {name: [] for name in LANES}
        there = list(range(len(blocks)))
        uses = [*there, *reversed(there)] if training else there
        self.turns = paging(uses, capacity=plan.resident, ahead=plan.prefetch, spent=training)
        arriving: dict[int, int] = {}
        under_way: collections.deque[int] = collections.deque()
        later: list[tuple[int, int]] = []
        last: list[int] = []
        for at, (used, turn) in enumerate(zip(uses, self.turns, strict=True)):
            for block in turn.loads:
                arriving[block] = self._fetch(block, last)
            gates = self._hand_on(uses[at - 1], last, under_way, later, plan) if at > len(blocks) else []
            one = blocks[used]
            seconds = one.forward_s if at < len(blocks) else one.backward_s
            last = [self._add("compute", seconds, [*last, *gates, arriving[used]])]
        if training:
            gates = self._hand_on(uses[-1], last, under_way, later, plan)
            for block, down in later:
                self._step(block, down, [*last, *gates])

    def _add(self, lane: str, seconds: float, needs: Sequence[int]) -> int:
        self.seconds.append(seconds)
        self.needs.append([(need, 0.0) for need in dict.fromkeys(needs)])
        self.order[lane].append(len(self.seconds) - 1)
        return len(self.seconds) - 1

    def _fetch(self, block: int, after: Sequence[int]) -> int:
        size, needs = self.blocks[block].parameter_bytes, list(after)
        if block in self.away:
            needs = [self._add("read", size / self.cluster.disk_bytes_per_s, needs)]
        return self._add("up", size / self.cluster.host_bytes_per_s, needs)

    def _hand_on(
        self,
        block: int,
        after: Sequence[int],
        under_way: collections.deque[int],
        later: list[tuple[int, int]],
        plan: OffloadPlan,
    ) -> list[int]:
        """The gradients' way and the step; what had to be done first."""
        gates = []
        while len(under_way) > _UNDER_WAY - 1:
            gates.append(under_way.popleft())
        needs = [*after, *gates]
        down = self._add("down", self.blocks[block].gradient_bytes / self.cluster.host_bytes_per_s, needs)
        if plan.overlap:
            under_way.append(self._step(block, down, needs))
        else:
            under_way.append(down)
            later.append((block, down))
        return gates

    def _step(self, block: int, down: int, after: Sequence[int]) -> int:
        one, needs = self.blocks[block], [down]
        size = one.parameter_bytes + one.state_bytes
        if block in self.away:
            needs.append(self._add("read", size / self.cluster.disk_bytes_per_s, after))
        stepped = self._add("host", one.step_s, [*needs, *after])
        if block not in self.away:
            return stepped
        return self._add("write", size / self.cluster.disk_bytes_per_s, [stepped])


def offload(
    blocks: Sequence[BlockLoad],
    cluster: Cluster,
    *,
    rest_bytes: float = 0.0,
    patience: float = 0.0,
    training: bool = True,
) -> Foreseen:
    """The plan whose step is shortest of those that fit; with patience, the one that takes least of the device.

    Every number of resident blocks is tried with up to four fetched ahead, and as few blocks on disk as the host's
    memory asks for, spread evenly, so that the disk's ways are never told many in a row.

    Args:
        blocks: from the first to the last.
        cluster: one of its devices, its host's memory and its disk.
        rest_bytes: of what else is on the device: activations, and parameters of no block with all that is theirs.
        patience: how much longer than the shortest step one may take for less memory, 0.1 for a tenth.
        training: a step of training rather than a forward pass.

    Raises:
        UsageError: nothing fits; says what is too small, and what would do.

    >>> block = BlockLoad(1.0, 1.0, 2.0, forward_s=1.0, backward_s=2.0, step_s=0.5)
    >>> found = offload([block] * 4, Cluster(memory_bytes=6.0, host_bytes=15.0, host_bytes_per_s=1.0))
    >>> found.plan.resident, found.plan.prefetch, found.step_s, found.binds
    (2, 1, 14.5, 'compute')

    Source: Abbasi et al., 2024, "Superpipeline"; Liao et al., 2024, "Adding NVMe SSDs to Enable and Accelerate 100B
    Model Fine-tuning on a Single GPU" (Fuyou).
    """
    if not patience >= 0:
        raise UsageError(word("patience", got=patience, allowed="be at least 0", where=_WHERE, fix="pass patience=0"))
    found, refused = [], []
    for resident in range(1, len(blocks) + 1):
        for prefetch in range(min(resident, _AHEAD + 1)):
            one = _with_room(blocks, cluster, OffloadPlan(resident, prefetch), training=training)
            fits = rest_bytes + one.device_bytes <= cluster.memory_bytes and one.host_bytes <= cluster.host_bytes
            (found if fits and one.disk_bytes <= cluster.disk_bytes else refused).append(one)
    if not found:
        raise UsageError(_nothing(refused, cluster, rest_bytes))
    shortest = min(one.step_s for one in found)
    near = [one for one in found if one.step_s <= shortest * (1 + patience) * (1 + 1e-9)]
    return min(near, key=lambda one: (one.device_bytes, one.step_s))


def _with_room(blocks: Sequence[BlockLoad], cluster: Cluster, plan: OffloadPlan, *, training: bool) -> Foreseen:
    """The plan with the fewest blocks on disk that leave the host's memory large enough, or all of them."""
    count = len(blocks)
    for away in range(count + 1):
        spread = tuple(at * count // away for at in range(away))
        plan = dataclasses.replace(plan, on_disk=spread)
        if _host(blocks, plan, training=training) <= cluster.host_bytes:
            break
    return foresee(blocks, cluster, plan, training=training)


def _nothing(refused: Sequence[Foreseen], cluster: Cluster, rest_bytes: float) -> str:
    """The words for a network that fits nowhere: what is short, and the least that would do."""
    least = min(refused, key=lambda one: (one.device_bytes, one.host_bytes))
    wants = {
        "memory_bytes": (rest_bytes + least.device_bytes, cluster.memory_bytes),
        "host_bytes": (least.host_bytes, cluster.host_bytes),
        "disk_bytes": (least.disk_bytes, cluster.disk_bytes),
    }
    short = {name: pair for name, pair in wants.items() if pair[0] > pair[1]}
    got = ", ".join(f"{name} {has:.4g} where {need:.4g} is wanted" for name, (need, has) in short.items())
    fix = " and ".join(f"{name} = {need:.4g}" for name, (need, _) in short.items())
    allowed = "hold the smallest plan, one block at a time"
    return word("the cluster", got=got, allowed=allowed, where=_WHERE, fix=f"take {fix}, or split the blocks")
