"""The best layouts of a step over a cluster: all that fit are foreseen, the fastest are kept."""

import dataclasses
from collections.abc import Iterator

from turnout.decide.device.memory import Held, Share, chunks, held, held_of, shares
from turnout.decide.device.pace import Pace, degrees, pace_of
from turnout.errors import UsageError, word
from turnout.types import Cluster, Layout, Plan, Workload

__all__ = ["Choice", "layouts"]

_WHERE = "turnout.decide.device.layouts"
# What of a device's memory is left to allocators, the wire's buffers and the runtime.
ROOM = 0.9
_SPLIT = ("ZBVZeroBubble", "InterleavedZeroBubble", "DualPipeV")
_SCHEDULES = ("1F1B", "Interleaved1F1B", "ZBVZeroBubble", "GPipe")


@dataclasses.dataclass(frozen=True)
class Choice:
    """A plan with what is foreseen of it.

    Args:
        plan: the plan.
        held: the bytes on its fullest device.
        pace: its step.
        cluster: the devices.

    >>> from turnout.types import BlockSize
    >>> network = Workload((BlockSize(10, 20.0, 1.0),) * 2, width=4, seq=8, batch=4)
    >>> (best,) = layouts(network, Cluster(devices_per_node=2), top=1)
    >>> best.plan.layout.world
    2

    Source: none; plain bookkeeping.
    """

    plan: Plan
    held: Held
    pace: Pace
    cluster: Cluster

    @property
    def price(self) -> float:
        """Of a step, in the cluster's currency."""
        return self.pace.step_s / 3600 * self.plan.layout.world * self.cluster.price_per_device_hour

    @property
    def runs(self) -> bool:
        """Whether ``turnout train`` plays it; tensor and context parallelism are foreseen here, and left to others."""
        return self.plan.layout.tp == self.plan.layout.cp == 1


def layouts(
    workload: Workload,
    cluster: Cluster,
    *,
    devices: int | None = None,
    foreign: bool = False,
    top: int = 5,
) -> tuple[Choice, ...]:
    """The fastest plans that fit, one for each layout, the fastest first.

    Every way to write the number of devices as pp x dp_replicate x dp_shard (x cp x tp) is tried, with every ep that
    divides the experts and what they are folded over, every stage of ZeRO, every schedule, and numbers of
    micro-batches up to eight a stage. Of plans that differ in ZeRO's stage alone the lowest that fits is kept.

    Args:
        workload: the network and its step.
        cluster: what there is.
        devices: how many to use; None for all.
        foreign: whether to look at tensor and context parallelism too, which ``turnout train`` does not run.
        top: how many to return.

    Raises:
        UsageError: nothing fits; says what is too large, where, and the smallest change that fits.

    >>> from turnout.types import BlockSize
    >>> block = BlockSize(1000, 2000.0, 10.0, experts=8, top_k=2, expert_params=500, expert_kept=5.0)
    >>> network = Workload((block,) * 4, width=8, seq=16, batch=8)
    >>> found = layouts(network, Cluster(devices_per_node=4, memory_bytes=1e6), top=3)
    >>> [choice.plan.layout.world for choice in found]
    [4, 4, 4]

    Source: Liu et al., 2025, "MoE Parallel Folding", for layouts of experts apart from attention's; the search is
    exhaustive.
    """
    world = cluster.devices if devices is None else devices
    if not 1 <= world <= cluster.devices:
        got, fix = f"{world}", f"pass devices={cluster.devices}"
        allowed = f"be between 1 and the cluster's {cluster.devices}"
        raise UsageError(word("devices", got=got, allowed=allowed, where=_WHERE, fix=fix))
    found: dict[Layout, Choice] = {}
    known_shares: dict[tuple[int, str], tuple[Share, ...]] = {}
    for plan in _plans(workload, cluster, world, foreign):
        parts = known_shares.get(key := (plan.layout.pp, plan.schedule))
        if parts is None:
            parts = known_shares[key] = shares(workload, plan)
        taken = held_of(parts, workload, plan)
        if taken.total > ROOM * cluster.memory_bytes:
            continue
        choice = Choice(plan, taken, pace_of(parts, workload, cluster, plan), cluster)
        known = found.get(plan.layout)
        if known is None or choice.pace.step_s < known.pace.step_s:
            found[plan.layout] = choice
    if not found:
        raise UsageError(_nothing(workload, cluster, world, foreign))
    order = sorted(found.values(), key=lambda choice: (choice.pace.step_s, choice.held.total))
    return tuple(_first_of_each(order)[:top])


def _first_of_each(order: list[Choice]) -> list[Choice]:
    """One choice for each layout but ZeRO's stage: the fastest."""
    seen, kept = set(), []
    for choice in order:
        name = dataclasses.replace(choice.plan.layout, zero=0)
        if name not in seen:
            seen.add(name)
            kept.append(choice)
    return kept


def _plans(workload: Workload, cluster: Cluster, world: int, foreign: bool) -> Iterator[Plan]:
    for layout in _layouts(workload, cluster, world, foreign):
        if workload.batch % layout.data_ranks:
            continue
        rows = workload.batch // layout.data_ranks
        for schedule in _SCHEDULES if layout.pp > 1 else ("1F1B",):
            if layout.pp * chunks(schedule) > len(workload.blocks):
                continue
            for m in _micro_batches(layout.pp, rows):
                yield Plan(layout, schedule=schedule, microbatches=m)
                if schedule not in _SPLIT:
                    yield Plan(layout, schedule=schedule, microbatches=m, recompute=True)


def _micro_batches(pp: int, rows: int) -> list[int]:
    """Numbers of micro-batches: of a pipeline those that fill it, else as few as fit."""
    if pp == 1:
        return [m for m in _divisors(rows) if m & (m - 1) == 0]
    return [m for m in _divisors(rows) if 2 * pp <= m <= 8 * pp] or [m for m in _divisors(rows) if m >= pp][:1]


def _layouts(workload: Workload, cluster: Cluster, world: int, foreign: bool) -> Iterator[Layout]:
    experts = workload.experts
    for pp in _divisors(world):
        if pp > len(workload.blocks):
            break
        for tp in _divisors(world // pp) if foreign else (1,):
            if tp > cluster.devices_per_node:
                break
            for cp in _divisors(world // pp // tp) if foreign else (1,):
                if cp > 16 or workload.seq % cp:
                    continue
                left = world // pp // tp // cp
                for shard in _divisors(left):
                    yield from _folded(experts, pp, left // shard, shard, cp, tp)


def _folded(experts: int, pp: int, replicate: int, shard: int, cp: int, tp: int) -> Iterator[Layout]:
    for ep in _divisors(shard * cp * tp):
        if ep > 1 and (not experts or experts % ep):
            continue
        for zero in (0, 1, 2, 3) if shard * cp * tp > 1 else (3,):
            yield Layout(pp, replicate, shard, cp, tp, ep, zero)


def _divisors(number: int) -> list[int]:
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    return small + [number // n for n in reversed(small) if n * n != number]


def _nothing(workload: Workload, cluster: Cluster, world: int, foreign: bool) -> str:
    """The words for a step that fits nowhere: what is in the way, and the smallest change that helps."""
    room = ROOM * cluster.memory_bytes
    plans = list(_plans(workload, cluster, world, foreign))
    if not plans:
        divides = max(n for n in _divisors(workload.batch) if world % n == 0)
        got = f"a batch of {workload.batch} sequences over {world} devices and {len(workload.blocks)} blocks"
        fix = f"pass a batch that is a multiple of {world}, or devices={divides}"
        return word("the step", got=got, allowed="be divided by some layout", where=_WHERE, fix=fix)
    best = min(plans, key=lambda plan: held(workload, plan).total)
    taken = held(workload, best)
    kinds = ", ".join(f"{name} {value / 1e9:.4g}" for name, value in taken.by_kind.items())
    on = f"the devices of pipeline stage {taken.stage}" if best.layout.pp > 1 else "every device"
    got = f"{taken.total / 1e9:.4g} GB on {on} under {degrees(best.layout)}, the smallest layout ({kinds} GB); the"
    got += f" largest is {taken.largest.removeprefix('the ')}"
    fixes = [f"devices with {taken.total / ROOM / 1e9:.3g} GB"]
    for factor in (2, 4, 8, 16, 32, 64):
        more = dataclasses.replace(cluster, nodes=cluster.nodes * factor)
        larger = _plans(workload, more, world * factor, foreign)
        if any(held(workload, plan).total <= room for plan in larger):
            fixes.insert(0, f"nodes = {more.nodes}")
            break
    shorter = dataclasses.replace(workload, seq=max(1, workload.seq // 2))
    if any(held(shorter, plan).total <= room for plan in _plans(shorter, cluster, world, foreign)):
        fixes.insert(0, f"a seq of {shorter.seq}")
    return word(
        "the step", got=got, allowed=f"fit into {room / 1e9:.4g} GB, nine tenths of a device", where=_WHERE,
        fix=f"take {', or '.join(fixes)}",
    )  # fmt: skip
