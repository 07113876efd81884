"""Random costs of a block's tasks, on which claims about its schedule are measured."""

import dataclasses
import random
from collections.abc import Callable, Sequence

from turnout.decide.device import block_schedule
from turnout.measure import simulate_block
from turnout.solve import list_schedule
from turnout.types import BlockCosts, BlockSchedule, BlockTask

__all__ = ["drawn", "over_bound", "planned", "reordered"]


def drawn(seed: int, count: int, *, inner: bool = False) -> list[BlockCosts]:
    """Costs in seconds: attention, experts 0.3 to 2, all-to-alls 0.2 to 2, a reduction 0.1 to 2, a start 0.01 to 0.08.

    With ``inner`` each all-to-all has a stage inside the node of 0.1 to 1 too. None of another seed is among them.

    Source: none; the spread of what published systems profile, made wide.
    """
    found = []
    for number in range(count):
        chance = random.Random(f"block {seed} {number}")
        attention, experts = chance.uniform(0.3, 2), chance.uniform(0.3, 2)
        dispatch, reduce, start = chance.uniform(0.2, 2), chance.uniform(0.1, 2), chance.uniform(0.01, 0.08)
        inside = chance.uniform(0.1, 1) if inner else 0.0
        found.append(
            BlockCosts.even(
                attention=attention, experts=experts, dispatch=dispatch, reduce=reduce, start=start, inner=inside
            )
        )
    return found


def planned(profiles: Sequence[BlockCosts], method: str, blocks: int) -> list[BlockSchedule]:
    """A method's schedule of each profile.

    Source: none; plain bookkeeping.
    """
    return [block_schedule(costs, blocks=blocks, method=method) for costs in profiles]


def over_bound(plans: Sequence[BlockSchedule], profiles: Sequence[BlockCosts]) -> list[float]:
    """The simulated time of a step of each, over what no schedule can be below.

    Source: none; plain bookkeeping.
    """
    times = [simulate_block(plan, costs) for plan, costs in zip(plans, profiles, strict=True)]
    return [each.makespan_s / each.bound_s for each in times]


def reordered(plan: BlockSchedule, costs: BlockCosts, rank: Callable[[BlockTask], float]) -> BlockSchedule:
    """The plan's tasks where each resource takes what is ready with the lowest rank.

    Source: Graham, 1966, "Bounds for certain multiprocessing anomalies".
    """
    tasks, needs = plan.tasks, plan.needs()
    number = {task: at for at, task in enumerate(tasks)}
    on = [("compute", "wire", "inner").index(task.resource) for task in tasks]
    waits = [[number[one] for one in needs[task]] for task in tasks]
    orders = list_schedule(on, [costs.seconds(task, plan) for task in tasks], waits, list(map(rank, tasks)))
    named = [tuple(tasks[at] for at in order) for order in orders] + [()] * (3 - len(orders))
    return dataclasses.replace(plan, compute=named[0], wire=named[1], inner=named[2])
