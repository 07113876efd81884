"""What is not played is refused by name, before anything is sent."""

import dataclasses

import pytest
import torch
from torch import nn

from turnout.errors import UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.block_tasks import BlockTasks
from turnout.run.blocks.block import BlockPlayer
from turnout.run.blocks.block_gradients import BlockGradients
from turnout.run.blocks.block_profile import serial
from turnout.types import BlockTask


class Ranks:
    """As many as are asked for."""

    def __init__(self, count: int) -> None:
        self.size = lambda: count


def tiny(**changes) -> LMConfig:
    moe = {"num_experts": 4, "top_k": 2, "hidden": 4} | changes.pop("moe", {})
    return LMConfig(vocab_size=8, width=8, layers=1, heads=2, moe=MoEConfig(**moe), **changes)


PARTS = [BlockTasks(LM(tiny()).blocks[0], 0)]
SIZE = 4 * sum(p.numel() for p in PARTS[0].dense)
GOOD = serial(1, 2, dense=(SIZE,))


def carried() -> object:
    return dataclasses.replace(GOOD, carried=(BlockTask("Ra", 0, 0),))


@pytest.mark.parametrize(
    ("schedule", "ranks", "said"),
    [
        (dataclasses.replace(GOOD, cut="sequence"), 2, "got cut='sequence'"),
        (carried(), 2, "got carried reductions"),
        (serial(2, 2, dense=(SIZE,)), 2, "blocks must be as many as the schedule's 2"),
        (GOOD, 3, "the ranks must divide 4 experts"),
        (serial(1, 2), 2, "dense_bytes must be pieces of the gradient where several ranks sum it"),
        (serial(1, 2, dense=(SIZE,), expert=(4,)), 2, "expert_bytes must be pieces of the gradient where several"),
        (serial(1, 2, dense=(SIZE - 4, 8)), 2, "the pieces of the gradient must be of the"),
    ],
)
def test_a_schedule_that_does_not_fit_is_refused(schedule, ranks: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        BlockPlayer(schedule, PARTS, group=Ranks(ranks), data=Ranks(ranks))


def test_a_sharded_parameter_is_refused() -> None:
    class Part(torch.Tensor):
        """Of a tensor that others hold parts of too."""

    with pytest.raises(UsageError, match=r"the parameters of block 1 must be plain tensors.* got Part"):
        BlockGradients([torch.zeros(2).as_subclass(Part).requires_grad_()], (), "block 1")


def test_autocast_is_refused() -> None:
    player = BlockPlayer(GOOD, PARTS, group=Ranks(2), data=Ranks(2))
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(UsageError, match=r"blocks must .* got autocast"):
        player.step(torch.zeros(2, 3, 8), lambda *_: torch.zeros(()))
    player.close()


def test_a_schedule_that_lacks_a_task_is_refused() -> None:
    with pytest.raises(UsageError, match=r"the schedule must have every task .* got without E'0.1"):
        less = tuple(task for task in GOOD.compute if str(task) != "E'0.1")
        BlockPlayer(dataclasses.replace(GOOD, compute=less), PARTS, group=Ranks(2), data=Ranks(2))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"moe": {"router": "ExpertChoice"}}, "got the router ExpertChoice"),
        ({"moe": {"router": "Switch", "top_k": 1}}, "got the router Switch"),
        ({"moe": {"router_options": {"capacity_factor": 1.0}}}, "got the router TopK with a capacity"),
    ],
)
def test_a_block_whose_parts_do_not_add_up_is_refused(changes: dict, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        BlockTasks(LM(tiny(**changes)).blocks[0], 0)


def test_a_dense_block_is_refused() -> None:
    lm = LM(LMConfig(vocab_size=8, width=8, layers=1, heads=2))
    with pytest.raises(UsageError, match=r"block 0 must have experts .* got a dense feed-forward layer"):
        BlockTasks(lm.blocks[0], 0)


def test_experts_that_torch_shards_are_refused() -> None:
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        block = LM(tiny()).blocks[0]
        fully_shard(block.ff.bank)
        with pytest.raises(
            UsageError, match=r"block 0 must have experts that nothing else shards in .* got experts as"
        ):
            BlockTasks(block, 0)
    finally:
        torch.distributed.destroy_process_group()


def test_gradients_of_two_dtypes_are_refused() -> None:
    mixed = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))]
    with pytest.raises(UsageError, match=r"the dtypes of block 3 must be one"):
        BlockGradients(mixed, (), "block 3")


def test_a_gradient_lies_in_memory_as_its_parameter_does() -> None:
    parameter = nn.Parameter(torch.randn(3, 4, 5).transpose(1, 2))
    gradients = BlockGradients([parameter, nn.Parameter(torch.randn(2))], (), "a block")
    made = gradients.of[parameter]
    assert made.shape == parameter.shape and made.stride() == parameter.stride()
    made.copy_(torch.arange(60.0).view(3, 5, 4))
    assert sorted(gradients.flat[:60].tolist()) == list(range(60)) and not gradients.flat[60:].any()
