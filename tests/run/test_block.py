"""Blocks played by a schedule: the gradients of one process, whatever the order, the parts and the routing."""

import copy
import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from processes import outcomes, spawn
from torch import Tensor

from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.block_tasks import BlockTasks
from turnout.run.block import BlockPlayer, Played
from turnout.run.processes import Ranks
from turnout.types import BlockSchedule, BlockTask

SEQ, EXPERTS = 6, 4


def pieces(total: int, count: int) -> tuple[int, ...]:
    """So many bytes in so many pieces, of whole floats."""
    floats = total // 4
    return tuple(4 * ((i + 1) * floats // count - i * floats // count) for i in range(count))


def anyhow(seed: int, blocks: int, parts: tuple[int, int], dense: tuple[int, ...], expert: tuple[int, ...], turn: str):
    """A schedule in an order drawn among all that come to an end, some backward passes in halves."""
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
        blocks, ra, re, tuple(t for t in tasks if t.resource == "compute"), tuple(t for t in tasks if t.resource == "wire"),
        dense_bytes=dense, expert_bytes=expert, turn=turn, method=f"drawn with seed {seed}",
    )
    left, done = dict(start.needs()), list[BlockTask]()
    while left:
        ready = [task for task, needs in left.items() if not any(need in left for need in needs)]
        done.append(rng.choice(sorted(ready)))
        del left[done[-1]]
    order = {name: tuple(t for t in done if t.resource == name) for name in ("compute", "wire")}
    schedule = dataclasses.replace(start, **order)
    schedule.check()
    return schedule


def config(**changes) -> LMConfig:
    moe = {"num_experts": EXPERTS, "top_k": 2, "hidden": 8} | changes.pop("moe", {})
    return LMConfig(vocab_size=31, width=16, layers=2, heads=2, max_seq=16, init_std=0.2, moe=MoEConfig(**moe), **changes)


def owned(lm: LM, rank: int, ranks: int) -> LM:
    """The model as one of several ranks has it: with its part of each bank."""
    lm = copy.deepcopy(lm)
    for block in lm.blocks:
        bank = block.ff.bank
        each = bank.num_experts // ranks
        bank.num_experts = each
        for name, stack in list(bank.named_parameters()):
            setattr(bank, name, torch.nn.Parameter(stack.detach()[rank * each : (rank + 1) * each].clone()))
    return lm


def batch(seed: int, sequences: int, padded: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    id_BS = torch.randint(0, 31, (sequences, SEQ), generator=generator)
    length_B = torch.randint(1, SEQ + 1, (sequences,), generator=generator)
    mask_BS = torch.arange(SEQ) >= (SEQ - length_B)[:, None] if padded else None
    return id_BS, id_BS.roll(-1, 1), mask_BS


def played(lm: LM, player: BlockPlayer, id_BS: Tensor, target_BS: Tensor, mask_BS: Tensor | None, total: int) -> Played:
    """A step of a language model whose blocks are played."""
    begun = lm.begin(id_BS, attention_mask=mask_BS)

    def loss(y_BSD: Tensor, rows: slice, gates: Sequence) -> Tensor:
        places = None if begun.places is None else dataclasses.replace(begun.places, real_BT=begun.places.real_BT[rows])
        return lm.nats(y_BSD, target_BS[rows], places=places) / total

    done = player.step(begun.x_BSD, loss, begun)
    begun.x_BSD.backward(done.slope_BSD)
    return done


def wrong(lm: LM, whole: LM, rank: int, ranks: int) -> dict[str, float]:
    """Each parameter's largest error against one process's, of its largest gradient or 1e-3, whichever is more."""
    found, blocks = {}, {id(p) for block in lm.blocks for p in block.parameters()}
    truth = dict(whole.named_parameters())
    for name, parameter in lm.named_parameters():
        grad, right = parameter.grad, truth[name].grad
        grad = torch.zeros_like(parameter) if grad is None else grad.clone()
        if id(parameter) not in blocks:
            dist.all_reduce(grad)
        if ".bank." in name:
            each = right.shape[0] // ranks
            right = right[rank * each : (rank + 1) * each]
        found[name] = ((grad - right).abs().max() / right.abs().max().clamp(min=1e-3)).item()
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


def all_cases(ranks: Ranks, seed: int) -> list[str]:
    """Every case that is wrong on this rank, in words."""
    faults = []
    for number, (parts, count, turn, sequences, changes, padded) in enumerate(CASES):
        changes = dict(changes)
        empty, name = changes.pop("empty", False), f"case {number}, seed {seed}"
        whole = LM(config(**copy.deepcopy(changes)), seed=seed)
        if empty:  # experts 2 and 3, and with two ranks the whole second rank, never get a row
            with torch.no_grad():
                for block in whole.blocks:
                    block.ff.router.weight[:] = 0
        worlds = [batch(100 * seed + rank, sequences[rank], padded) for rank in range(ranks.world)]
        total = sum(target.numel() for _, target, _ in worlds)
        for id_BS, target_BS, mask_BS in worlds:
            (whole.loss(id_BS, target_BS, attention_mask=mask_BS).nats / total).backward()
        lm = owned(whole, ranks.rank, ranks.world)
        blocks = [BlockTasks(block, layer) for layer, block in enumerate(lm.blocks)]
        size = sum(p.numel() * 4 for p in blocks[0].dense)
        schedule = anyhow(seed + number, len(blocks), parts, pieces(size, count), (), turn)
        player = BlockPlayer(schedule, blocks, group=dist.group.WORLD, data=dist.group.WORLD)
        played(lm, player, *worlds[ranks.rank], total)
        player.close()
        bad = {name: error for name, error in wrong(lm, whole, ranks.rank, ranks.world).items() if error > 1e-5}
        faults += [f"{name}: {bad}"] if bad else []
    return faults


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_those_of_one_process(world: int) -> None:
    for rank, faults in enumerate(spawn(world, all_cases, 3)):
        assert not faults, f"rank {rank}: " + "\n".join(faults)
