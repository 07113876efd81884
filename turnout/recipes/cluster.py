"""What this machine does as a cluster: several processes that compute and talk at the same time, measured."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from turnout.measure.memory import free_memory
from turnout.recipes.spawned import spawned
from turnout.types import Cluster

__all__ = ["as_toml", "measured_cluster"]

_SMALL, _LARGE = 64, 1 << 21  # bytes of a message that is all latency, and of one that is all rate
_ROUNDS = 7


def measured_cluster(ranks: int, *, width: int = 256) -> Cluster:
    """This machine, shared by so many processes on gloo with a thread each, all of them at work when it is timed.

    Args:
        ranks: how many processes.
        width: of the matrices that are multiplied; near the model's, because small products are slower.

    Returns:
        One node with ``ranks`` devices: medians over a few rounds, the slowest rank's.

    Raises:
        TrainingError: the processes did not come together.

    Source: none; least squares through two sizes.
    """
    worst = spawned(ranks, _slowest, width)
    free = free_memory()
    return Cluster(
        nodes=1,
        devices_per_node=ranks,
        memory_bytes=float(free or 4 << 30) / ranks,
        flops_per_s=worst["flops"],
        memory_bytes_per_s=worst["memory"],
        intra_bytes_per_s=worst["rate"],
        intra_latency_s=worst["latency_s_each"],
        inter_bytes_per_s=worst["rate"],
        inter_latency_s=worst["latency_s_each"],
        name=f"{ranks} processes on {os.cpu_count()} cores",
    )


def _slowest(width: int) -> dict[str, float]:
    """What every rank measured, the slowest of each."""
    found = _measure(width)
    signs = torch.tensor([-1.0 if name.endswith("_s_each") else 1.0 for name in found], dtype=torch.float64)
    values = torch.tensor(list(found.values()), dtype=torch.float64) * signs
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return dict(zip(found, (values * signs).tolist(), strict=True))


def _measure(width: int) -> dict[str, float]:
    a, b = torch.randn(256, width), torch.randn(width, 4 * width)
    flops = 2 * a.numel() * b.shape[1] / _median(lambda: a @ b)
    big = torch.empty(1 << 22)
    memory = 2 * big.numel() * 4 / _median(lambda: big.copy_(big + 1)) * 2
    n = dist.get_world_size()
    if n == 1:
        return {"flops": flops, "memory": memory, "rate": memory, "latency_s_each": 0.0}
    times = [_median(lambda size=size: _exchange(size, n)) for size in (_SMALL, _LARGE)]
    rate = (_LARGE - _SMALL) * (n - 1) / n / max(times[1] - times[0], 1e-9)
    return {"flops": flops, "memory": memory, "rate": rate, "latency_s_each": times[0] / (n - 1)}


def _exchange(size: int, ranks: int) -> None:
    sent = torch.zeros(size // ranks * ranks, dtype=torch.uint8)
    dist.all_to_all_single(torch.empty_like(sent), sent)


def _median(work: Callable[[], object]) -> float:
    """Seconds of ``work``, the median of a few rounds that all ranks begin together."""
    found = []
    for _ in range(_ROUNDS):
        dist.barrier()
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    return statistics.median(found[1:])


def as_toml(cluster: Cluster) -> str:
    """The cluster as the file that ``Cluster.open`` reads."""
    lines = []
    for field in dataclasses.fields(cluster):
        value = getattr(cluster, field.name)
        text = f'"{value}"' if isinstance(value, str) else f"{value:.4g}" if isinstance(value, float) else str(value)
        if isinstance(value, float) and not any(mark in text for mark in ".e"):
            text += ".0"
        lines.append(f"{field.name} = {text}")
    return "\n".join(lines) + "\n"
