"""What is foreseen of offloading: closed forms, the runtime's bytes and seconds, and what fits."""

import time

import pytest
import torch
from torch import nn

from turnout.decide.device import BlockLoad, foresee, offload
from turnout.errors import UsageError
from turnout.run.blocks.wire import Slow
from turnout.run.swap.offload import Offloaded
from turnout.run.swap.offload_ways import Slowed
from turnout.types import Cluster, OffloadPlan

L = 6
EVEN = [BlockLoad(1.0, 1.0, 2.0, forward_s=1.0, backward_s=2.0, step_s=0.5)] * L


def _cluster(**parts: float) -> Cluster:
    wide = {"host_bytes_per_s": 1.0, "disk_bytes_per_s": 1.0, "host_bytes": 1e9, "disk_bytes": 1e9}
    return Cluster(**(wide | {"memory_bytes": 1e9} | parts))


@pytest.mark.parametrize("resident", range(1, L + 1))
def test_closed_form_without_prefetch(resident: int) -> None:
    """Each block waits for its way, but those that stay when the pass turns round; the last step comes on top."""
    found = foresee(EVEN, _cluster(), OffloadPlan(resident, 0))
    assert found.step_s == pytest.approx(3 * L + (2 * L - resident) + 1 + 0.5)
    assert found.parameter_bytes == resident


def test_closed_form_where_all_hides() -> None:
    """One way before the first block, one gradient's way and one step behind the last."""
    assert foresee(EVEN, _cluster(), OffloadPlan(3, 1)).step_s == pytest.approx(1 + 3 * L + 1 + 0.5)


@pytest.mark.parametrize("width", [0.5, 1.0, 4.0])
def test_closed_form_where_steps_come_after(width: float) -> None:
    """All of them on the host, when nothing overlaps them."""
    late = foresee(EVEN, _cluster(host_bytes_per_s=width), OffloadPlan(3, 1, overlap=False)).step_s
    slowest = BlockLoad(1.0, 1.0, 2.0, 1.0, 2.0, step_s=10.0)
    blocks = [slowest] * L
    assert foresee(blocks, _cluster(host_bytes_per_s=width), OffloadPlan(3, 1, overlap=False)).step_s == pytest.approx(
        late + L * 9.5
    )


def test_more_room_ahead_or_apart_never_takes_longer() -> None:
    """On random profiles: overlap against none, and a disk against memory."""
    chance = torch.Generator().manual_seed(0)
    for seed in range(100):
        numbers = torch.rand(6, generator=chance).tolist()
        blocks = [BlockLoad(*(0.1 + x for x in numbers))] * L
        cluster = _cluster(disk_bytes_per_s=0.2 + 3 * float(torch.rand((), generator=chance)))
        resident = 2 + seed % 4
        plain, late, away = (
            foresee(blocks, cluster, OffloadPlan(resident, 1, on_disk, overlap)).step_s
            for on_disk, overlap in (((), True), ((), False), ((0, 2, 4), True))
        )
        # The bound on what is under way may hold up the computation by a block's step, never by more.
        assert plain <= late + blocks[0].step_s + 1e-9, (seed, plain, late)
        assert plain <= away + 1e-9, (seed, plain, away)


class Slept(nn.Module):
    """A layer that takes its time both ways."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_full_backward_pre_hook(lambda *_: time.sleep(0.04))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return torch.tanh(self.linear(x))


class Sleepy(torch.optim.AdamW):
    """An optimizer that takes its time."""

    def step(self, closure=None):
        time.sleep(0.03)
        return super().step(closure)


PLANS = [
    OffloadPlan(1, 0), OffloadPlan(3, 2), OffloadPlan(2, 1), OffloadPlan(2, 1, overlap=False),
    OffloadPlan(2, 1, (0, 2, 4)), OffloadPlan(2, 1, (0, 2, 4), overlap=False),
]  # fmt: skip


@pytest.mark.slow
def test_real_runs_take_what_is_foreseen_and_hold_no_more() -> None:
    """Bytes exactly or below, on the device and the host; where all is sleep, seconds not below, and not twice."""
    size = 4.0 * (16 * 16 + 16)
    way = size / 0.03  # bytes in a second: 30 ms a block
    loads = [BlockLoad(size, size, 2 * size, 0.02, 0.04, 0.03)] * L
    cluster = Cluster(host_bytes_per_s=way, disk_bytes_per_s=3 * way)
    each = Slow(0.0, 1 / way), Slow(0.0, 1 / way / 3)
    slow = Slowed(up=each[0], down=each[0], read=each[1], write=each[1])
    for plan in PLANS:
        net = nn.Sequential(*(Slept() for _ in range(L)))
        x = torch.randn(2, 16, requires_grad=True)
        with Offloaded(net, plan, lambda own: Sleepy(own, lr=0.1), blocks=list(net), slow=slow) as off:
            seconds = []
            for _ in range(3):
                begin = time.perf_counter()
                off.step(lambda net=net, x=x: net(x).square().sum())
                seconds.append(time.perf_counter() - begin)
            foreseen = foresee(loads, cluster, plan)
            assert off.parameters.peak == foreseen.parameter_bytes
            assert off.parameters.peak + off.gradients.peak <= foreseen.device_bytes
            assert off.host.peak <= foreseen.host_bytes
        assert 0.9 * foreseen.step_s < min(seconds[1:]) < 2 * foreseen.step_s, (plan, seconds)  # a busy machine is late


def test_the_shortest_that_fits_and_with_patience_the_smallest() -> None:
    """Against all that could be."""
    cluster = _cluster(memory_bytes=7.0)
    found = offload(EVEN, cluster)
    others = [foresee(EVEN, cluster, OffloadPlan(r, p)) for r in range(1, L + 1) for p in range(r)]
    fits = [one for one in others if one.device_bytes <= 7.0]
    assert found.step_s == min(one.step_s for one in fits) and found.device_bytes <= 7.0
    patient = offload(EVEN, cluster, patience=0.6)
    assert patient.device_bytes == min(one.device_bytes for one in fits if one.step_s <= 1.6 * found.step_s)
    assert patient.device_bytes < found.device_bytes
    with pytest.raises(UsageError, match="patience"):
        offload(EVEN, cluster, patience=-1)


def test_as_few_on_disk_as_memory_asks_for() -> None:
    """And what is foreseen of the host fits."""
    before = 0
    for host in (24.0, 20.0, 18.0, 16.5):
        found = offload(EVEN, _cluster(host_bytes=host))
        assert found.host_bytes <= host
        assert len(found.plan.on_disk) >= before
        before = len(found.plan.on_disk)
    assert before


def test_what_does_not_fit_says_what_would() -> None:
    """On the device, the host or the disk."""
    for short, fix in (({"memory_bytes": 3.0}, "memory_bytes = 4"), ({"host_bytes": 5.0}, "host_bytes = 9")):
        with pytest.raises(UsageError, match=fix):
            offload(EVEN, _cluster(**short))
    with pytest.raises(UsageError, match="disk_bytes = 18"):
        offload(EVEN, _cluster(host_bytes=10.0, disk_bytes=1.0))
    assert offload(EVEN, _cluster(memory_bytes=4.0)).plan.resident == 1
