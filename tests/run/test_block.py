"""Blocks played by a schedule: the gradients of one process, whatever the order, the parts and the routing."""

import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from processes import outcomes, spawn
from torch import Tensor

from turnout.decide.device.block_schedule import METHODS, block_schedule
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.block_tasks import BlockTasks
from turnout.models.overlapped import Overlapped, own_experts
from turnout.run.blocks.block import BlockPlayer, Played
from turnout.run.blocks.block_pass import BlockPass
from turnout.run.ranks.processes import Ranks
from turnout.types import BlockCosts, BlockSchedule, BlockTask, Routing

SEQ, EXPERTS = 6, 4
MOST = 1e-6  # of a parameter's largest gradient, or of a tenth of the largest of all


def pieces(total: int, count: int) -> tuple[int, ...]:
    """So many bytes in so many pieces, of whole floats."""
    floats = total // 4
    return tuple(4 * ((i + 1) * floats // count - i * floats // count) for i in range(count))


def anyhow(
    seed: int,
    blocks: int,
    parts: tuple[int, int],
    dense: tuple[int, ...],
    expert: tuple[int, ...],
    turn: str,
    in_turn: bool = False,
) -> BlockSchedule:
    """A schedule in an order drawn among all that come to an end, some backward passes in halves.

    Where chunks take turns, each sum over chunks is taken in their order.
    """
    rng, (ra, re) = random.Random(seed), parts
    kinds = {"A": ra, "G": ra, "G'": ra, "D": re, "E": re, "C": re, "C'": re, "D'": re}
    kinds |= {"Ra": len(dense), "Re": len(expert)}
    tasks = [BlockTask(kind, b, c) for b in range(blocks) for kind, count in kinds.items() for c in range(count)]
    for name, count in (("A", ra), ("E", re)):
        for b in range(blocks):
            for c in range(count):
                halves = ("x", "w") if rng.random() < 0.5 else ("'",)
                tasks += [BlockTask(name + half, b, c) for half in halves]
    start = BlockSchedule(
        blocks,
        ra,
        re,
        tuple(t for t in tasks if t.resource == "compute"),
        tuple(t for t in tasks if t.resource == "wire"),
        dense_bytes=dense,
        expert_bytes=expert,
        turn=turn,
        method=f"drawn with seed {seed}",
    )
    left, done = dict(start.needs()), list[BlockTask]()
    while left:
        ready = [task for task, needs in left.items() if not any(need in left for need in needs)]
        ready = [task for task in ready if not in_turn or not any(before(other, task) for other in left)]
        done.append(rng.choice(sorted(ready)))
        del left[done[-1]]
    order = {name: tuple(t for t in done if t.resource == name) for name in ("compute", "wire")}
    schedule = dataclasses.replace(start, **order)
    schedule.check()
    return schedule


def before(one: BlockTask, other: BlockTask) -> bool:
    """Whether a task adds to the same sum as the other one, for an earlier chunk."""
    sums = [
        {kind[0] + half for half in (kind[1:] if kind[1:] != "'" or kind[0] not in "AE" else "xw")} or {kind}
        for kind in (one.kind, other.kind)
    ]
    return one.block == other.block and one.chunk < other.chunk and bool(sums[0] & sums[1])


def config(**changes) -> LMConfig:
    moe = {"num_experts": EXPERTS, "top_k": 2, "hidden": 8} | changes.pop("moe", {})
    return LMConfig(
        vocab_size=31, width=16, layers=2, heads=2, max_seq=16, init_std=0.2, moe=MoEConfig(**moe), **changes
    )


def batch(seed: int, sequences: int, padded: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    id_BS = torch.randint(0, 31, (sequences, SEQ), generator=generator)
    length_B = torch.randint(1, SEQ + 1, (sequences,), generator=generator)
    mask_BS = torch.arange(SEQ) >= (SEQ - length_B)[:, None] if padded else None
    return id_BS, id_BS.roll(-1, 1), mask_BS


def wrong(lm: LM, whole: LM, rank: int, ranks: int) -> dict[str, float]:
    """Each parameter's largest error against one process's, of its largest gradient."""
    found = {}
    truth = dict(whole.named_parameters())
    largest = max(parameter.grad.abs().max().item() for parameter in truth.values())
    for name, parameter in lm.named_parameters():
        grad, right = parameter.grad, truth[name].grad
        grad = torch.zeros_like(parameter) if grad is None else grad.clone()
        if ".bank." in name:
            each = right.shape[0] // ranks
            right = right[rank * each : (rank + 1) * each]
        found[name] = ((grad - right).abs().max() / right.abs().max().clamp(min=largest / 10)).item()
    return found


CASES = [
    # parts of attention and experts, pieces of the gradient, the turn, sequences of each rank, changes of the model
    ((1, 1), 1, "whole", (3, 2, 4, 1), {}, False),
    ((2, 2), 2, "whole", (3, 5, 2, 1), {}, False),
    ((3, 3), 3, "chunk", (4, 7, 3, 5), {}, False),
    ((2, 3), 4, "chunk", (5, 4, 1, 3), {"moe": {"shared_hidden": 8, "shared_gate": True}}, False),
    ((3, 2), 2, "whole", (5, 1, 3, 2), {"norm_place": "both", "qkv_bias": True, "out_bias": True}, False),
    ((4, 1), 1, "whole", (3, 2, 2, 6), {"moe": {"bias": True, "activation": "gelu"}}, False),
    ((1, 5), 7, "chunk", (5, 6, 7, 8), {"tie_embeddings": True}, True),
    ((4, 6), 3, "whole", (4, 4, 2, 5), {"moe": {"router": "Hash", "top_k": 1}}, False),
    ((2, 2), 2, "chunk", (2, 2, 2, 2), {"empty": True}, False),
]


def squared(loss: Tensor, routings: Sequence[Routing]) -> Tensor:
    """A loss that asks for more than the nats: a z-loss of a sort, a sum over rows."""
    logits = [routing.logit_TE for routing in routings if routing.logit_TE is not None]
    return loss + sum(0.001 * logit_TE.square().sum() for logit_TE in logits)


def one_case(
    ranks: Ranks,
    seed: int,
    changes: dict,
    sequences: Sequence[int],
    padded: bool,
    schedules: Callable,
    spoil: Callable | None = None,
    ep: int | None = None,
    objective: Callable | None = None,
) -> Iterator[tuple[str, dict[str, float], LM]]:
    """Each schedule's name and errors on this rank, of one model and batch; ``schedules(blocks, bytes)`` gives them.

    ``ep`` neighbours share the experts, and others have copies of them; all ranks share them where it is None.
    """
    ep = ep or ranks.world
    groups = [dist.new_group(list(range(first, first + ep))) for first in range(0, ranks.world, ep)]
    copies = [dist.new_group(list(range(first, ranks.world, ep))) for first in range(ep)]
    changes = copy.deepcopy(changes)
    empty = changes.pop("empty", False)
    whole = LM(config(**changes), seed=seed)
    if empty:  # experts 2 and 3, and with two ranks the whole second rank, never get a row
        with torch.no_grad():
            for block in whole.blocks:
                block.ff.router.weight[:] = 0
    worlds = [batch(100 * seed + rank, sequences[rank], padded) for rank in range(ranks.world)]
    total = sum(target.numel() for _, target, _ in worlds)
    for id_BS, target_BS, mask_BS in worlds:
        done = whole.loss(id_BS, target_BS, attention_mask=mask_BS)
        (done.nats / total if objective is None else objective(done.nats / total, done.routings)).backward()
    bytes_of = 4 * sum(p.numel() for p in BlockTasks(whole.blocks[0], 0).dense)
    for schedule in schedules(len(whole.blocks), bytes_of):
        lm = own_experts(copy.deepcopy(whole), rank=ranks.rank % ep, ranks=ep)
        of = {"group": groups[ranks.rank // ep], "data": dist.group.WORLD, "copies": copies[ranks.rank % ep]}
        overlapped = Overlapped(lm, schedule, **of)
        if spoil is not None:
            spoil(overlapped.player)
        id_BS, target_BS, mask_BS = worlds[ranks.rank]
        overlapped.step(id_BS, target_BS, tokens=total, attention_mask=mask_BS, objective=objective)
        overlapped.close()
        yield schedule.method, wrong(lm, whole, ranks.rank % ep, ep), lm


def all_cases(ranks: Ranks, seed: int) -> list[str]:
    """Every case that is wrong on this rank, in words."""
    faults = []
    for number, (parts, count, turn, sequences, changes, padded) in enumerate(CASES):
        objective = squared if turn == "whole" else None

        def drawn(blocks: int, size: int, at=(number, parts, count, turn)) -> list[BlockSchedule]:
            return [anyhow(seed + at[0], blocks, at[1], pieces(size, at[2]), (), at[3])]

        for name, errors, _ in one_case(ranks, seed, changes, sequences, padded, drawn, objective=objective):
            bad = {name: error for name, error in errors.items() if error > MOST}
            faults += [f"case {number}, {name}: {bad}"] if bad else []
    return faults


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_those_of_one_process(world: int) -> None:
    for rank, faults in enumerate(spawn(world, all_cases, 3)):
        assert not faults, f"rank {rank}: " + "\n".join(faults)


def copied(ranks: Ranks) -> list[str]:
    """What is wrong where two ranks share the experts and two others have copies of them."""

    def drawn(blocks: int, size: int) -> list[BlockSchedule]:
        bank = BlockTasks(own_experts(LM(config()), rank=0, ranks=2).blocks[0], 0).expert
        expert = pieces(4 * sum(p.numel() for p in bank), 3)
        return [anyhow(n, blocks, (2, 3), pieces(size, 2), expert, "chunk") for n in range(2)]

    found = one_case(ranks, 2, {}, (3, 2, 4, 1), False, drawn, ep=2)
    return [f"{name}: {errors}" for name, errors, _ in found if max(errors.values()) > MOST]


@pytest.mark.slow
def test_copies_of_experts_share_their_gradient() -> None:
    assert spawn(4, copied) == [[], [], [], []]


def profiles(seed: int, size: int) -> BlockCosts:
    """Costs drawn as the card draws them, for blocks of this size."""
    rng = random.Random(seed)
    times = {"attention": rng.uniform(0.3, 2), "experts": rng.uniform(0.3, 2), "dispatch": rng.uniform(0.2, 2)}
    costs = BlockCosts.even(**times, reduce=rng.uniform(0.1, 2), start=rng.uniform(0.01, 0.08), rows=30, most_chunks=5)
    return dataclasses.replace(costs, dense_bytes=size)


def planned(ranks: Ranks, seeds: Sequence[int]) -> list[str]:
    """What the planner prints, by every method, that is wrong on this rank."""
    faults = []
    for seed in seeds:

        def of(blocks: int, size: int, seed: int = seed) -> list[BlockSchedule]:
            costs = profiles(seed, size)
            few = block_schedule(
                costs, blocks=blocks, memory_blocks=0.9 * blocks
            )  # some chunks come back before others go
            assert few.window is not None
            few = dataclasses.replace(few, method="turnout, little memory")
            return [*(block_schedule(costs, blocks=blocks, method=method) for method in METHODS), few]

        for name, errors, _ in one_case(ranks, seed, {"empty": seed % 2 == 1}, (5, 3, 4, 2), False, of):
            bad = {parameter: error for parameter, error in errors.items() if error > MOST}
            faults += [f"{name}, seed {seed}: {bad}"] if bad else []
    return faults


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_method_of_the_planner_has_the_gradients_of_one_process(world: int) -> None:
    for rank, faults in enumerate(spawn(world, planned, (11, 12, 13))):
        assert not faults, f"rank {rank}: " + "\n".join(faults)


def in_any_order(ranks: Ranks, seed: int) -> list[str]:
    """Where orders of the same parts, on two ranks, differ in a bit."""
    faults, first = [], {}

    def several(blocks: int, size: int) -> list[BlockSchedule]:
        return [anyhow(seed + n, blocks, (3, 2), pieces(size, 1 + n), (), "whole", in_turn=True) for n in range(4)]

    for name, _, lm in one_case(ranks, seed, {}, (4, 5), False, several):
        for parameter, p in lm.named_parameters():
            grad = first.setdefault(parameter, p.grad.clone())
            faults += [] if torch.equal(grad, p.grad) else [f"{name}: {parameter}"]
    return faults


@pytest.mark.slow
def test_on_two_ranks_order_and_pieces_change_no_bit() -> None:
    assert spawn(2, in_any_order, 5) == [[], []]


# ---- what is wrong is found


def reduced_twice(player: BlockPlayer) -> None:
    once = player._reduce_dense

    def reduce(done: BlockPass, at: tuple[int, int]) -> int:
        return once(done, at) + (once(done, at) if at[1] == 1 else 0)

    player._reduce_dense = reduce


def slopes_in_place_of_gradients(player: BlockPlayer) -> None:
    """What the released code of FlowMoE sums: the gradient of what went into attention."""

    def reduce(done: BlockPass, at: tuple[int, int]) -> int:
        slope = done._x_slopes[at[0], 0].sum(0)  # of the same shape on each rank
        dist.all_reduce(slope)
        return slope.numel() * 4

    player._reduce_dense = reduce


def chunk_dropped(player: BlockPlayer) -> None:
    start = player.step

    def step(*arguments) -> Played:
        pay = BlockPass._experts_weight
        BlockPass._experts_weight = lambda self, block, chunk: chunk == 1 or pay(self, block, chunk)
        try:
            return start(*arguments)
        finally:
            BlockPass._experts_weight = pay

    player.step = step


def not_reduced(player: BlockPlayer) -> None:
    player._reduce_dense = lambda done, at: 0


def planted(ranks: Ranks) -> dict[str, float]:
    """The largest error with each fault."""
    found = {}
    for spoil in (None, reduced_twice, slopes_in_place_of_gradients, chunk_dropped, not_reduced):

        def two(blocks: int, size: int) -> list[BlockSchedule]:
            return [anyhow(1, blocks, (2, 2), pieces(size, 3), (), "whole")]

        for _, errors, _ in one_case(ranks, 1, {}, (3, 4), False, two, spoil):
            found[spoil.__name__ if spoil else "none"] = max(errors.values())
    return found


@pytest.mark.slow
def test_what_is_planted_is_found() -> None:
    for found in spawn(2, planted):
        assert found.pop("none") <= MOST
        assert min(found.values()) > 100 * MOST, found


def other_order(ranks: Ranks) -> None:
    for name, _, _ in one_case(ranks, 1, {}, (3, 4), False, lambda blocks, size: [swapped(blocks, size, ranks.rank)]):
        raise AssertionError(f"{name} was played")


def swapped(blocks: int, size: int, rank: int) -> BlockSchedule:
    schedule = anyhow(1, blocks, (2, 2), pieces(size, 3), (), "whole")
    if rank == 1:  # two pieces of one gradient, either of which may go first
        order = list(schedule.wire)
        at = [place for place, task in enumerate(order) if task.kind == "Ra" and task.block == 0][:2]
        order[at[0]], order[at[1]] = order[at[1]], order[at[0]]
        schedule = dataclasses.replace(schedule, wire=tuple(order))
        schedule.check()
    return schedule


@pytest.mark.slow
def test_ranks_with_other_orders_are_refused_before_they_begin() -> None:
    found = outcomes(2, other_order)
    assert all(
        each.error.startswith("UsageError: the schedule of blocks must be the same on every rank") for each in found
    )
    assert found[0].error == found[1].error
