"""What this machine does as a cluster: several processes that compute and talk at the same time, measured."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from turnout.measure.memory import free_memory
from turnout.models import LM
from turnout.recipes.run import Run
from turnout.recipes.spawned import check_bears, spawned
from turnout.recipes.workload import workload_of
from turnout.types import Cluster

__all__ = ["as_toml", "measured_cluster"]

_SMALL, _LARGE = 64, 1 << 21  # bytes of a message that is all latency, and of one that is all rate
_ROUNDS = 7


def measured_cluster(ranks: int, run: Run) -> Cluster:
    """This machine, shared by so many processes on gloo with a thread each, all of them at work when it is timed.

    How fast a device computes is what the model's own training passes reach, of a whole batch and of a part of it: the
    line through both times gives flops_per_s and block_s.

    Args:
        ranks: how many processes.
        run: the model that is going to be planned, and its batch.

    Returns:
        One node with ``ranks`` devices: medians over a few rounds, the slowest rank's.

    Raises:
        UsageError: more processes than this machine bears.
        TrainingError: the processes did not come together.

    Source: none; least squares through two sizes.
    """
    fix = "pass --here {most}, or measure on a machine that is as large as yours"
    check_bears(ranks, "--here", where="turnout plan", fix=fix)
    worst = spawned(ranks, _slowest, run)
    free = free_memory()
    return Cluster(
        nodes=1,
        devices_per_node=ranks,
        memory_bytes=float(free or 4 << 30) / ranks,
        flops_per_s=worst["flops"],
        block_s=worst["block_s_each"],
        memory_bytes_per_s=worst["memory"],
        intra_bytes_per_s=worst["rate"],
        intra_latency_s=worst["latency_s_each"],
        inter_bytes_per_s=worst["rate"],
        inter_latency_s=worst["latency_s_each"],
        hides=worst["hides"],
        name=f"{ranks} processes on {os.cpu_count()} cores",
    )


def _slowest(run: Run) -> dict[str, float]:
    """What every rank measured, the slowest of each."""
    found = _measure(run)
    signs = torch.tensor([-1.0 if name.endswith("_s_each") else 1.0 for name in found], dtype=torch.float64)
    values = torch.tensor(list(found.values()), dtype=torch.float64) * signs
    dist.all_reduce(values, op=dist.ReduceOp.MIN)
    return dict(zip(found, (values * signs).tolist(), strict=True))


def _measure(run: Run) -> dict[str, float]:
    flops, block_s, passes = _computing(run)
    big = torch.empty(1 << 22)
    memory = 2 * big.numel() * 4 / _median(lambda: big.copy_(big + 1)) * 2
    n = dist.get_world_size()
    if n == 1:
        return {
            "flops": flops,
            "block_s_each": block_s,
            "memory": memory,
            "rate": memory,
            "hides": 1.0,
            "latency_s_each": 0.0,
        }
    times = [_median(lambda size=size: _exchange(size, n)) for size in (_SMALL, _LARGE)]
    rate = (_LARGE - _SMALL) * (n - 1) / n / max(times[1] - times[0], 1e-9)
    found = {"flops": flops, "block_s_each": block_s, "memory": memory, "rate": rate, "hides": _hidden(passes, n)}
    return found | {"latency_s_each": times[0] / (n - 1)}


def _hidden(passes: Callable[[], None], ranks: int) -> float:
    """How much of a message's time computing hides: of both at once, against each alone."""
    size = _LARGE // ranks * ranks
    sent, got = torch.zeros(size, dtype=torch.uint8), torch.empty(size, dtype=torch.uint8)
    computing = _median(passes)
    # As many messages as take about as long as the passes, by the slowest rank's count.
    one = _median(lambda: dist.all_to_all_single(got, sent))
    count = torch.tensor(max(1.0, computing / one))
    dist.all_reduce(count, op=dist.ReduceOp.MIN)

    def talk() -> list["dist.Work | None"]:
        return [dist.all_to_all_single(got, sent, async_op=True) for _ in range(int(count))]

    def both() -> None:
        works = talk()
        passes()
        _finish(works)

    talking, together = _median(lambda: _finish(talk())), _median(both)
    return min(1.0, max(0.0, (computing + talking - together) / min(computing, talking)))


def _finish(works: Sequence["dist.Work | None"]) -> None:
    for work in works:
        if work is not None:
            work.wait()


def _computing(run: Run) -> tuple[float, float, Callable[[], None]]:
    """Operations a second of the model's passes, the seconds that a block takes whatever its size, and the passes."""
    rows = max(2, run.train.batch * run.train.accumulate // dist.get_world_size())
    lm = LM(run.model).train()
    work = workload_of(run, batch=rows)
    each = sum(block.all_flops for block in work.blocks) + 2.0 * run.model.vocab_size * run.model.width
    ids = torch.zeros(rows, run.train.seq, dtype=torch.long)
    ids.random_(run.model.vocab_size, generator=torch.Generator().manual_seed(0))
    parts = (max(1, rows // 4), rows)
    times = [_median(lambda part=part: _passes(lm, ids[:part])) for part in parts]
    token_s = (times[1] - times[0]) / ((parts[1] - parts[0]) * run.train.seq)
    token_s = min(max(token_s, 0.1 * times[1] / (rows * run.train.seq)), times[1] / (rows * run.train.seq))
    left = max(0.0, times[1] - token_s * rows * run.train.seq)
    return 3 * each / token_s, left / (3 * len(work.blocks)), lambda: _passes(lm, ids)


def _passes(lm: LM, id_BS: torch.Tensor) -> None:
    lm.loss(id_BS, id_BS).nats.backward()
    lm.zero_grad(set_to_none=True)


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
