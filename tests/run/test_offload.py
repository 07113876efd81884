"""Blocks moved between device, memory and disk: plain training to the bit, and no more bytes than the plan says."""

import copy
import itertools
import time

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from turnout.errors import StorageError, TrainingError, UsageError
from turnout.models.config import LMConfig, MoEConfig
from turnout.models.lm import LM
from turnout.run.blocks.wire import Slow
from turnout.run.swap.offload import Offloaded
from turnout.run.swap.offload_ways import Slowed
from turnout.types import OffloadPlan

D, BLOCKS = 8, 5
SIZE = (D * D + D + D) * 4


class Layer(nn.Module):
    """x + tanh(W x) * g; a view of the weight is what its backward pass keeps."""

    def __init__(self, frozen: bool = False) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(D, D), nn.Parameter(torch.ones(D), requires_grad=not frozen)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        y = torch.tanh(x @ self.linear.weight.t() + self.linear.bias)
        return x + y * self.scale, {"aux": y.square().mean()}


class Net(nn.Module):
    """Layers between an embedding and a head that is the same."""

    def __init__(self, layers: int = BLOCKS, frozen: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.table = nn.Parameter(torch.randn(7, D))
        self.blocks = nn.ModuleList(Layer(frozen) for _ in range(layers))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        x, aux = self.table[ids], torch.zeros(())
        for block in self.blocks:
            x, more = block(x)
            aux = aux + more["aux"]
        return x @ self.table.t(), aux

    def loss(self, ids: Tensor) -> Tensor:
        logits, aux = self(ids)
        return F.cross_entropy(logits, ids.roll(1)) + 0.1 * aux


def adam(own: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(own, lr=0.05, weight_decay=0.1)


def _ids(step: int) -> Tensor:
    return torch.randint(7, (6,), generator=torch.Generator().manual_seed(step))


def _plain(net: nn.Module, loss, steps: int) -> list[float]:
    optimizer, losses = adam([p for p in net.parameters() if p.requires_grad]), []
    for step in range(steps):
        value = loss(net, step)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(value.item())
    return losses


PLANS = [
    OffloadPlan(resident, prefetch, on_disk, overlap)
    for (resident, prefetch), on_disk, overlap in itertools.product(
        [(1, 0), (2, 0), (2, 1), (3, 1), (3, 2), (5, 1), (9, 4)], [(), (0, 3), tuple(range(BLOCKS))], [True, False]
    )
]


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_numbers_are_those_of_plain_training_and_bytes_are_the_plan_s(plan: OffloadPlan) -> None:
    """To the bit: losses, parameters in training, what a checkpoint holds, and the bytes at their peak."""
    net, judge = Net(), Net()
    want = _plain(judge, lambda net, step: net.loss(_ids(step)), 4)
    with Offloaded(net, plan, adam) as off:
        got = [float(off.step(lambda step=step: net.loss(_ids(step)))) for step in range(4)]
        saved = off.values()
        assert all(p.numel() == 0 for p in net.blocks.parameters())
        assert off.parameters.now == off.gradients.now == 0
        assert off.parameters.peak == min(plan.resident, BLOCKS) * SIZE
        assert off.gradients.peak <= 3 * SIZE
        on_disk = len(plan.on_disk) * SIZE
        held = off.host.now  # parameters and two moments of those that are not on disk
        assert held == 3 * (BLOCKS * SIZE - on_disk)
    assert got == want
    for (name, a), b in zip(net.named_parameters(), judge.parameters(), strict=True):
        assert torch.equal(a, b), name
        assert torch.equal(saved[name], b), name


@pytest.mark.parametrize("recompute", [False, True])
def test_a_language_model_with_experts(recompute: bool) -> None:
    """Its decisions and their losses too; with blocks computed once more for the backward pass, and bytes to learn."""
    config = LMConfig(vocab_size=32, width=16, layers=3, heads=2, hidden=24, max_seq=9, moe=MoEConfig(4, 2, hidden=8))
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))

    def loss(lm: nn.Module, step: int) -> Tensor:
        return lm.loss(ids[:, :-1], ids[:, 1:]).nats / 16

    lm, judge = LM(config, seed=1).train(), LM(config, seed=1).train()
    for one in (lm, judge):
        for block in one.blocks:
            block.recompute = recompute
    want = _plain(judge, loss, 3)
    with Offloaded(lm, OffloadPlan(1, 0, (1,)), adam) as off:
        got = [float(off.step(lambda step=step: loss(lm, step))) for step in range(3)]
        logits = off.run(lambda: lm(ids).logits_BSV)
    assert got == want
    assert all(torch.equal(a, b) for a, b in zip(lm.parameters(), judge.parameters(), strict=True))
    with torch.no_grad():  # with gradients attention goes another way
        assert torch.equal(logits, judge(ids).logits_BSV)


def test_inference_keeps_what_it_has_room_for() -> None:
    """Many passes in one call; with room for all but one, a pass fetches little."""
    net = Net()
    want = net(_ids(0))[0].detach()
    with Offloaded(net, OffloadPlan(4, 1), adam) as off:
        seen = []
        load = off._load
        off._load = lambda block: (seen.append(block), load(block))
        for out in off.run(lambda: [net(_ids(0))[0] for _ in range(3)]):
            assert torch.equal(out, want)
        assert off.parameters.peak == 4 * SIZE
        assert len(seen) == 8, seen  # of fifteen, were nothing kept


def test_frozen_front_and_unused_parameters() -> None:
    """Blocks that get no gradient are not stepped, and not waited for."""

    def net() -> Net:
        found = Net()
        found.table.requires_grad_(False)
        for p in found.blocks[:2].parameters():
            p.requires_grad_(False)
        found.blocks[3].unused = nn.Parameter(torch.ones(3))
        return found

    mine, judge = net(), net()
    want = _plain(judge, lambda net, step: net.loss(_ids(step)), 3)
    with Offloaded(mine, OffloadPlan(2, 1, (0, 3)), adam) as off:
        assert [float(off.step(lambda step=step: mine.loss(_ids(step)))) for step in range(3)] == want
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), judge.parameters(), strict=True))


class _Sleepy(torch.optim.AdamW):
    def step(self, closure=None):
        time.sleep(0.02)
        return super().step(closure)


def test_prefetch_and_overlap_save_time() -> None:
    """Where ways and steps take long, both do; the same numbers come out."""

    class Slept(Layer):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)

    def seconds(plan: OffloadPlan) -> float:
        net = Net(0)
        net.blocks = nn.ModuleList(Slept() for _ in range(6))
        for block in net.blocks:
            block.register_full_backward_pre_hook(lambda *_: time.sleep(0.02))
        slow = Slowed(up=Slow(0.02))
        with Offloaded(net, plan, lambda own: _Sleepy(own, lr=0.1), slow=slow) as off:
            took = []
            for _ in range(4):  # the least of them: other work makes a step longer, never shorter
                begin = time.perf_counter()
                off.step(lambda: net.loss(_ids(0)))
                took.append(time.perf_counter() - begin)
            return min(took[1:])

    both, late, none = (seconds(OffloadPlan(2, p, overlap=o)) for p, o in ((1, True), (1, False), (0, False)))
    assert both < 0.9 * late < 0.9 * none, (both, late, none)


def test_a_changed_file_is_seen(tmp_path) -> None:
    """One bit of the disk's, and nothing goes on from it."""
    net = Net()
    off = Offloaded(net, OffloadPlan(2, 1, (2,)), adam, folder=tmp_path)
    path = tmp_path / "block-2.parameters"
    body = bytearray(path.read_bytes())
    body[5] ^= 1
    path.write_bytes(body)
    with pytest.raises(StorageError, match=r"block-2.parameters.*hold what was written"):
        off.step(lambda: net.loss(_ids(0)))
    with pytest.raises(UsageError, match="halfway"):
        off.step(lambda: net.loss(_ids(0)))


def test_refusals() -> None:
    """By name, before anything is trained."""
    tied = Net()
    tied.blocks[1].linear.weight = tied.blocks[3].linear.weight
    with pytest.raises(UsageError, match=r"blocks.1.linear.weight"):
        Offloaded(tied, OffloadPlan(), adam)
    used = Net()
    used.table = used.blocks[0].linear.weight
    with pytest.raises(UsageError, match="be its own"):
        Offloaded(used, OffloadPlan(), adam)
    with pytest.raises(UsageError, match="5 blocks"):
        Offloaded(Net(), OffloadPlan(on_disk=(5,)), adam)
    with pytest.raises(UsageError, match="list of modules"):
        Offloaded(nn.Linear(2, 2), OffloadPlan(), adam)
    for wrong in ({"resident": 0}, {"resident": 2, "prefetch": 2}, {"on_disk": (1, 1)}):
        with pytest.raises(UsageError):
            OffloadPlan(**wrong)


def test_calls_out_of_place_are_refused() -> None:
    """Outside of a step, in another order, or twice."""
    net = Net()
    with Offloaded(net, OffloadPlan(), adam) as off:
        with pytest.raises(UsageError, match="inside step"):
            net(_ids(0))
        with pytest.raises(UsageError, match="called in order"):
            off.run(lambda: net.blocks[1](torch.ones(1, D)))
        with pytest.raises(UsageError, match="called in order"):
            off.step(lambda: net.loss(_ids(0)) + net.loss(_ids(0)))
        with pytest.raises(UsageError, match="halfway"):
            off.step(lambda: net.loss(_ids(0)))
    with pytest.raises(UsageError, match="closed"):
        off.run(lambda: None)


def test_writing_into_what_is_kept_is_seen() -> None:
    """As it is without offloading."""

    class Rude(Layer):
        def forward(self, x):
            y, more = super().forward(x)
            kept = y.exp()
            out = kept * 2
            with torch.no_grad():
                kept.mul_(0)
            return out, more

    net = Net()
    net.blocks[1] = Rude()
    with Offloaded(net, OffloadPlan(), adam) as off, pytest.raises(TrainingError, match="kept tensor"):
        off.step(lambda: net.loss(_ids(0)))


def test_copies_leave_the_model_alone() -> None:
    """A model that was closed is an ordinary one."""
    net = Net()
    before = copy.deepcopy(net)
    with Offloaded(net, OffloadPlan(1, 0, (0,)), adam):
        pass
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), before.parameters(), strict=True))
    net.loss(_ids(0)).backward()
    assert not net.blocks[0]._forward_hooks and not net.blocks[0]._forward_pre_hooks
