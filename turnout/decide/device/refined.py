"""A layout's pipeline played by the timed simulator, under the schedule that suits its own stages best."""

import dataclasses
from collections.abc import Iterator

from turnout.decide.device.gpipe import gpipe
from turnout.decide.device.interleaved import interleaved
from turnout.decide.device.layouts import ROOM, Choice
from turnout.decide.device.memory import chunks, shares
from turnout.decide.device.named_schedule import named_schedule
from turnout.decide.device.one_f_one_b import one_f_one_b
from turnout.decide.device.pace import pace_of, wire
from turnout.decide.device.search import known_schedules, search
from turnout.decide.device.zbv import zbv
from turnout.solve.pipeline import PipelineTimes, pipeline
from turnout.types import Plan, Schedule, StageCosts, Workload

__all__ = ["played_by", "refined", "stage_costs"]

# Of each name, how torch's runtime has it; anything else goes along in full.
_MANY = 512  # tasks of a direction that are not searched through
_TORCH = {"GPipe": "GPipe", "1F1B": "1F1B", "Interleaved1F1B": "Interleaved1F1B"}


def stage_costs(workload: Workload, choice: Choice, *, each: int, action_s: float = 0.0) -> StageCosts:
    """What the tasks of a choice's pipeline take, in seconds and bytes, with so many stages a device.

    A stage's forward is its share of a micro-batch's computing and of its experts' exchanges; the gradient of the input
    takes as long, and that of the weights what computing alone does.

    Args:
        workload: the network and its step.
        choice: the layout, with its cluster.
        each: stages of a device.
        action_s: what every task takes on top.

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism": T_F, T_B and T_W.
    """
    layout, cluster = choice.plan.layout, choice.cluster
    flat = Plan(dataclasses.replace(layout, pp=layout.pp * each), microbatches=choice.plan.microbatches)
    flat = dataclasses.replace(flat, recompute=choice.plan.recompute)
    parts = shares(workload, flat)
    forward, back, weight, kept = [], [], [], []
    tokens = workload.tokens / (layout.data_ranks * layout.cp * flat.microbatches)
    for part in parts:
        # One stage alone, as if it were a network of its own on the same devices.
        alone = dataclasses.replace(flat, layout=dataclasses.replace(layout, pp=1), schedule="1F1B")
        step = pace_of((part,), workload, cluster, alone)
        m = flat.microbatches
        compute = step.seconds["compute"] / m
        waits = sum(step.seconds.get(name, 0.0) for name in ("experts' exchange", "tensor parallel", "sequence")) / m
        passes = 4 if flat.recompute else 3
        one = compute / passes
        forward.append(one + waits / (passes - 1))
        back.append(one * (passes - 2) + waits * (passes - 2) / (passes - 1))
        weight.append(one)
        numbers = part.blocks * workload.width if flat.recompute else part.kept / layout.tp + part.expert_kept
        once = 0.0 if flat.recompute else part.kept_once
        kept.append((tokens * numbers + once) * workload.number_bytes)
    message = wire(cluster, 2, layout.world // layout.pp).send(tokens * workload.travelling)
    return StageCosts(tuple(forward), tuple(back), tuple(weight), send=message, overhead=action_s,
                      activation_S=tuple(kept))  # fmt: skip


def refined(workload: Workload, choice: Choice, *, tries: int = 40, action_s: float = 0.0) -> Choice:
    """The choice under the schedule that the simulator likes best, one or two stages a device, within its memory.

    Published schedules are played, and searched on from; one that was found by search goes along in the plan, action by
    action. A plan that recomputes keeps to schedules whose backward pass is one task.

    Args:
        workload: the network and its step.
        choice: of ``layouts``.
        tries: how long to search.
        action_s: what every task takes on top.

    Returns:
        The choice with its plan's schedule, and its bubble as simulated; unchanged without a pipeline.

    >>> from turnout.decide.device import layouts
    >>> from turnout.types import BlockSize, Cluster, Layout
    >>> network = Workload((BlockSize(10_000, 2e4, 10.0),) * 8, width=4, seq=8, batch=16)
    >>> found = layouts(network, Cluster(devices_per_node=4), top=100)
    >>> piped = next(one for one in found if one.plan.layout.pp == 4)
    >>> refined(network, piped).pace.step_s <= piped.pace.step_s * 1.01
    True

    Source: none; ``turnout.decide.device.search``.
    """
    layout = choice.plan.layout
    if layout.pp == 1:
        return choice
    best: tuple[float, Schedule] | None = None
    for each in (1, 2):
        if layout.pp * each > len(workload.blocks):
            continue
        costs = stage_costs(workload, choice, each=each, action_s=action_s)
        for schedule in _candidates(costs, _room(workload, choice), choice.plan, tries):
            times = pipeline(schedule, costs)
            if best is None or times.makespan < best[0]:
                best = times.makespan, schedule
    if best is None:
        return choice
    makespan, schedule = best
    name = _TORCH.get(schedule.name)
    plan = dataclasses.replace(
        choice.plan,
        schedule=name or schedule.name,
        actions=None if name else schedule,
        stages=_sizes(workload, schedule),
    )
    seconds = {k: v for k, v in choice.pace.seconds.items() if k not in ("bubble", "stages")}
    within = sum(v for k, v in seconds.items() if k not in ("gathering", "reducing", "optimizer"))
    seconds |= {"bubble": max(0.0, makespan - within)}
    return dataclasses.replace(choice, plan=plan, pace=dataclasses.replace(choice.pace, seconds=seconds))


def played_by(workload: Workload, choice: Choice) -> tuple[Schedule, PipelineTimes] | None:
    """The choice's pipeline and when each of its tasks runs, as the simulator has it; None without a pipeline.

    Args:
        workload: the network and its step.
        choice: as ``refined`` gave it.

    Source: none; ``turnout.solve.pipeline``.
    """
    plan = choice.plan
    if plan.layout.pp == 1:
        return None
    schedule = plan.actions or named_schedule(plan.schedule, plan.layout.pp, plan.microbatches)
    return schedule, pipeline(schedule, stage_costs(workload, choice, each=schedule.stages // plan.layout.pp))


def _sizes(workload: Workload, schedule: Schedule) -> tuple[int, ...]:
    count, stages = len(workload.blocks), schedule.stages
    return tuple(count // stages + (stage < count % stages) for stage in range(stages))


def _room(workload: Workload, choice: Choice) -> float:
    """The bytes that a device has for what its micro-batches keep."""
    fixed = choice.held.total - choice.held.by_kind["activations"]
    return ROOM * choice.cluster.memory_bytes - fixed


def _candidates(costs: StageCosts, room: float, plan: Plan, tries: int) -> Iterator[Schedule]:
    """Schedules to play; of a pipeline with many tasks those alone that the plan may have meant."""
    ranks, m = plan.layout.pp, plan.microbatches
    if costs.stages * m > _MANY:
        make = {"1F1B": one_f_one_b, "GPipe": gpipe, "Interleaved1F1B": interleaved, "ZBVZeroBubble": zbv}[
            plan.schedule
        ]
        if costs.stages == ranks * chunks(plan.schedule):
            yield make(ranks, m)
        return
    known = [*known_schedules(costs, ranks, m, memory=room)]
    yield from (one for one in known if not (plan.recompute and one.splits_backward))
    if known and not plan.recompute:
        yield search(costs, ranks, m, memory=room, tries=tries).schedule
