"""Block schedules of plans: which layouts play one, what it is foreseen to hide, and what it hid."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

from turnout.decide.device import Choice, block_schedule, held, pace
from turnout.decide.device.block_schedule import METHODS
from turnout.decide.device.layouts import ROOM
from turnout.decide.device.overlap_costs import overlap_costs
from turnout.decide.device.pace import wire
from turnout.errors import UsageError, word
from turnout.measure import simulate_block
from turnout.models.block_tasks import BlockTasks
from turnout.models.checkpoint.own import outline
from turnout.recipes.run import Run
from turnout.types import BlockCosts, BlockSchedule, Plan, Workload

__all__ = ["Overlap", "check_played", "overlapped", "told"]

NAMES = {"none": "no overlap", "tutel": "Tutel", "fsmoe": "FSMoE", "flowmoe": "FlowMoE", "turnout": "ours"}
_WHERE = "turnout train"
_TRIED = 4  # layouts that are looked at more closely, of those that could be fastest


def check_played(plan: Plan, *, where: str = _WHERE, turns: Sequence[str] = ("whole",)) -> BlockSchedule:
    """Refuses what is not trained by a block schedule with the gradients of one process.

    Args:
        plan: with an overlap.
        where: for messages.
        turns: when backward may begin; losses of routings are known to the whole batch alone.

    Returns:
        The schedule.

    Raises:
        UsageError: which part of the plan, and the nearest fix.

    Source: none; what ``turnout.models.overlapped.Overlapped`` plays.
    """
    layout, schedule = plan.layout, plan.overlap
    if schedule is None or layout.world == 1:
        got, fix = ("none", "plan with --overlap") if schedule is None else ("one", "leave overlap out of the plan")
        raise UsageError(word("the overlap", got=got, allowed="be one for several processes", where=where, fix=fix))
    known = {
        "pp": (layout.pp, 1, f"use dp_shard={layout.dp_shard * layout.pp} in its place"),
        "zero": (layout.zero, 0, "write zero=0 into the plan's layout, where copies of what is no expert fit"),
        "gather": (plan.gather, "full", "write 'full'"),
        "reduce": (plan.reduce, "full", "write 'full'"),
        "recompute": (plan.recompute, False, "write false, and more devices or a smaller batch if it must fit"),
        "secondary": (plan.secondary, None, "leave it out"),
        "placement": (plan.placement, None, "leave it out"),
    }
    for name, (got, allowed, fix) in known.items():
        if got != allowed:
            needed = f"be {allowed!r} where a plan has an overlap"
            raise UsageError(
                word(name, got=got if name != "placement" else "one", allowed=needed, where=where, fix=fix)
            )
    if schedule.turn not in turns:
        allowed, fix = f"be {' or '.join(turns)}", "plan it with: turnout plan MODEL --cluster FILE --overlap"
        raise UsageError(word("the schedule's turn", got=schedule.turn, allowed=allowed, where=where, fix=fix))
    return schedule


def told(plan: Plan, seconds: float, hidden: float) -> str:
    """What a pass took, beside what the planner foresaw, in words."""
    foreseen = "" if plan.foreseen_s is None else f", where {plan.foreseen_s * 1e3:.4g} ms were foreseen"
    return (
        f"a pass through the blocks and back took {seconds * 1e3:.4g} ms{foreseen}; "
        f"{hidden:.0%} of the wire's work ran under the chip's."
    )


@dataclasses.dataclass(frozen=True)
class Overlap:
    """A choice whose plan has a block schedule.

    Args:
        choice: with what is foreseen of it.
        makespans: the seconds once through the blocks and back, with the sums of gradients, by method.
        waits: the seconds that its step waits for the wire without a schedule, by what for.

    Source: none; plain bookkeeping.
    """

    choice: Choice
    makespans: Mapping[str, float]
    waits: Mapping[str, float]

    def lines(self) -> Iterator[str]:
        """In words."""
        schedule = self.choice.plan.overlap
        assert schedule is not None
        step = self.choice.pace.seconds
        known = {name: step[name] for name in ("exposed wire", "reducing")}
        told = ", ".join(f"{name} {seconds * 1e3:.4g} ms" for name, seconds in known.items())
        bare = ", ".join(f"{name} {seconds * 1e3:.4g} ms" for name, seconds in self.waits.items())
        yield f"waits for the wire: {told} (of what is in no block); without it: {bare}"
        parts = f"attention in {schedule.attention_chunks}, experts in {schedule.expert_chunks} parts"
        sums = [*schedule.dense_bytes, *schedule.expert_bytes]
        pieces = f"{len(sums)} of {min(sums) / 1e6:.3g} to {max(sums) / 1e6:.3g} MB a block" if sums else "none"
        yield f"{parts}; gradients' pieces: {pieces}"
        for method, seconds in self.makespans.items():
            ratio = seconds / self.makespans["none"]
            yield f"{NAMES[method]:<10} {seconds * 1e3:10.4g} ms through the blocks and back, {ratio:.3f} of no overlap"


def overlapped(run: Run, workload: Workload, choices: Sequence[Choice]) -> Overlap:
    """Of choices that spread experts and have no pipeline the fastest, with the best block schedule.

    Nothing but experts is sharded in them (zero=0), as long as that fits; and the batch goes through whole.

    Args:
        run: whose model it is.
        workload: its step.
        choices: of ``turnout.decide.device.layouts``.

    Raises:
        UsageError: a model whose blocks are not played, or none of the choices is.

    Source: none; ``turnout.decide.device.block_schedule``.
    """
    dense, experts = _bytes(run)
    able: list[tuple[float, Choice, BlockCosts]] = []
    for choice in {_flat(each).layout: each for each in choices if each.plan.layout.ep > 1 and each.runs}.values():
        plan = _flat(choice)
        taken = held(workload, plan)
        if plan.layout.pp > 1 or taken.total > ROOM * choice.cluster.memory_bytes:
            continue
        sizes = {"dense_bytes": dense, "expert_bytes": experts // plan.layout.ep}
        costs = overlap_costs(workload, choice.cluster, plan.layout, **sizes)
        able.append((costs.bound_s(len(workload.blocks)), dataclasses.replace(choice, plan=plan, held=taken), costs))
    if not able:
        got, fix = "none that fits with zero=0", "leave --overlap out, or give it more devices or memory"
        allowed = "hold a layout with ep > 1 and without a pipeline"
        raise UsageError(word("--overlap", got=got, allowed=allowed, where="turnout plan", fix=fix))
    able.sort(key=lambda one: one[0])
    # The search takes seconds; a published method tells which layout is worth it.
    near = [_planned(workload, choice, costs, ("flowmoe",)) for _, choice, costs in able[:_TRIED]]
    at = min(range(len(near)), key=lambda number: near[number].choice.pace.step_s)
    return _planned(workload, *able[at][1:], METHODS)


def _flat(choice: Choice) -> Plan:
    return Plan(dataclasses.replace(choice.plan.layout, zero=0))


def _bytes(run: Run) -> tuple[int, int]:
    """Of a block's gradients: everything but experts, and all experts."""
    if run.train.dtype == "bf16":
        got, fix = "dtype=bf16", "pass dtype=fp32, or leave --overlap out"
        raise UsageError(word("--overlap", got=got, allowed="be of fp32", where="turnout plan", fix=fix))
    blocks = [BlockTasks(block, layer) for layer, block in enumerate(outline(run.model).blocks)]  # pyrefly: ignore
    sizes = {tuple(sum(p.numel() * p.element_size() for p in kind) for kind in (b.dense, b.expert)) for b in blocks}
    if len(sizes) > 1:
        got, allowed = f"blocks of {len(sizes)} sizes", "have blocks that are all alike"
        raise UsageError(word("MODEL", got=got, allowed=allowed, where="turnout plan --overlap", fix="leave it out"))
    ((dense, experts),) = sizes
    return dense, experts


def _planned(workload: Workload, choice: Choice, costs: BlockCosts, methods: Sequence[str]) -> Overlap:
    blocks = len(workload.blocks)
    schedules = {method: block_schedule(costs, blocks=blocks, method=method) for method in methods}
    times = {method: simulate_block(schedule, costs) for method, schedule in schedules.items()}
    best = times[methods[-1]]
    plan = dataclasses.replace(choice.plan, overlap=schedules[methods[-1]], foreseen_s=best.makespan_s)
    step = pace(workload, choice.cluster, plan)
    seconds = {name: s for name, s in step.seconds.items() if name not in ("experts' exchange", "reducing")}
    seconds["compute"] += best.busy_s["compute"] - blocks * costs.compute_s()  # many parts start more often
    seconds["exposed wire"] = best.exposed_s
    rest = (workload.embedding_params + workload.head_params) * workload.grad_bytes
    seconds["reducing"] = 2 * wire(choice.cluster, plan.layout.data_ranks, 1).gather(rest)
    whole = dataclasses.replace(step, seconds=seconds)
    makespans = {method: one.makespan_s for method, one in times.items()}
    waits = {name: step.seconds[name] for name in ("experts' exchange", "reducing") if name in step.seconds}
    return Overlap(dataclasses.replace(choice, plan=plan, pace=whole), makespans, waits)
