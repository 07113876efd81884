"""Claim: optimizer steps on the host hide behind the backward pass, the ways behind both, and nothing is stale."""

import dataclasses
import statistics
from collections.abc import Callable

import torch

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.device import block_loads, foresee, offload
from turnout.models.lm import LM, LMConfig
from turnout.run.swap.homes import Build
from turnout.run.swap.offload import Offloaded
from turnout.types import BlockSize, Cluster, OffloadPlan, Workload

_PROFILES, _BLOCKS, _STEPS = 8, 12, 6
_WIDTH_13B, _BLOCKS_13B = 5120, 40  # GPT-3 13B


def fuyou() -> Claim:
    """Steps of networks whose parameters and Adam state lie in memory and on disk, on an RTX 4090 in the simulator.

    The off arm plays the same plan with all steps on the host after the backward pass. Naive swapping also fetches
    nothing ahead and keeps one block on the device.

    >>> fuyou().off
    'steps on the host after the backward pass'

    Source: Liao et al., 2024, "Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU".
    """
    off, over = "steps on the host after the backward pass", "over its computation alone"
    return Claim(
        name="fuyou",
        statement="Fetches, gradients, steps on the host and the disk's ways run beside the computation: a step takes "
        "less than without, and its numbers are those of plain training.",
        source="Liao et al., 2024, Adding NVMe SSDs to Enable and Accelerate 100B Model Fine-tuning on a Single GPU",
        off=off,
        switched={"planned": "steps after", "changed": "changed, one step late"},
        rows=(
            Row(f"time of a step {over}, mean of profiles", "below", "planned", "steps after", off),
            Row(
                "largest difference of weights from plain training, after some steps", "within", "changed",
                "changed, one step late", "gradients used one step late, as overlap without waiting does", bound=0.0,
            ),
            Row(f"time of a step of a 13B model {over}", "below", "13B", "13B, naive", "naive swapping", headline=True),
            Row(
                "time of that step over naive swapping's, where the paper has 45 over 156", "within", "13B, ratio",
                "13B, ratio, naive", "naive swapping", bound=45 / 156, headline=True,
            ),
        ),
        measure=_measure,
        seconds=8,
        simulated=True,
        note=f"{_PROFILES} profiles: blocks of 0.1 to 0.5 billion parameters, 8 to 64 thousand tokens a step, memory "
        "on the host for 30 to 120 % of what is kept, disks of 6 to 32 GB/s, 1 to 2 billion parameters stepped in a "
        "second. Times are simulated, the difference of weights is measured; activations are not swapped. The paper's "
        "45 TFLOPS are ZeRO-Infinity's, of whose losses naive swapping has only the waits between ways",
        limits=(0.0, 100.0),
    )  # fmt: skip


def _measure(seed: int) -> Values:
    chance = torch.Generator().manual_seed(seed)
    drawn = [_times(*_profile(chance)) for _ in range(_PROFILES)]
    size = 12 * _WIDTH_13B**2
    tokens = 1024 * int(torch.randint(8, 33, (1,), generator=chance))
    large = _times(*_machine(size, _BLOCKS_13B, tokens, host=0.8, disk=20e9), 1.5e9)
    return {
        "planned": statistics.fmean(planned for planned, _, _ in drawn),
        "steps after": statistics.fmean(after for _, after, _ in drawn),
        "13B": large[0],
        "13B, naive": large[2],
        "13B, ratio": large[0] / large[2],
        "13B, ratio, naive": 1.0,
        "changed": _changed(seed, late=False),
        "changed, one step late": _changed(seed, late=True),
    }


def _profile(chance: torch.Generator) -> tuple[Workload, Cluster, float]:
    size, tokens, host, disk, stepped = torch.rand(5, generator=chance).tolist()
    tokens = 1024 * round(8 * 8**tokens)
    machine = _machine(int(1e8 * (1 + 4 * size)), _BLOCKS, tokens, host=0.3 + 0.9 * host, disk=(6 + 26 * disk) * 1e9)
    return *machine, (1 + stepped) * 1e9


def _machine(params: int, blocks: int, tokens: int, *, host: float, disk: float) -> tuple[Workload, Cluster]:
    """A network with mixed-precision Adam, and an RTX 4090 whose host has room for a part of it."""
    work = Workload((BlockSize(params, 2.0 * params, 0.0),) * blocks, width=1, seq=1024, batch=tokens // 1024)
    kept = params * blocks * (work.param_bytes + work.optimizer_bytes)
    card = Cluster(memory_bytes=24e9, flops_per_s=1.65e14, host_bytes=host * kept, host_bytes_per_s=21e9)
    return work, dataclasses.replace(card, disk_bytes=8e12, disk_bytes_per_s=disk)


def _times(work: Workload, cluster: Cluster, stepped_per_s: float) -> tuple[float, float, float]:
    """A step as planned, with the steps on the host after it, and swapped naively, over its computation."""
    loads = block_loads(work, cluster, stepped_per_s=stepped_per_s)
    found = offload(loads, cluster)
    computed = sum(block.forward_s + block.backward_s for block in loads)
    after = foresee(loads, cluster, dataclasses.replace(found.plan, overlap=False))
    naive = foresee(loads, cluster, OffloadPlan(1, 0, found.plan.on_disk, overlap=False))
    return found.step_s / computed, after.step_s / computed, naive.step_s / computed


def _changed(seed: int, *, late: bool) -> float:
    """How far the weights are from plain training's: of an offloaded model, or of one whose gradients come late."""
    config = LMConfig(vocab_size=64, width=32, layers=4, heads=4, hidden=64, max_seq=16)
    ids = torch.randint(64, (_STEPS, 4, 16), generator=torch.Generator().manual_seed(seed))
    plain, other = LM(config, seed=seed), LM(config, seed=seed)

    def loss(lm: LM, step: int) -> torch.Tensor:
        return lm.loss(ids[step][:, :-1], ids[step][:, 1:]).nats / (4 * 15)

    def build(own: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(own, lr=1e-3)

    _train(plain, build, loss, late=False)
    if late:
        _train(other, build, loss, late=True)
    else:
        with Offloaded(other, OffloadPlan(2, 1, (1, 3)), build) as off:
            for step in range(_STEPS):
                off.step(lambda step=step: loss(other, step))
    pairs = zip(plain.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def _train(lm: LM, build: Build, loss: Callable[[LM, int], torch.Tensor], *, late: bool) -> None:
    own = list(lm.parameters())
    optimizer, waiting = build(own), None
    for step in range(_STEPS):
        found = torch.autograd.grad(loss(lm, step), own)
        waiting, now = (found, waiting) if late else (None, found)
        if now is None:
            continue
        for parameter, gradient in zip(own, now, strict=True):
            parameter.grad = gradient
        optimizer.step()
