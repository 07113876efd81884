"""Claim: sharding optimizer state, gradients and parameters leaves each device the bytes of ZeRO's table."""

import torch
import torch.distributed as dist

from turnout.claims.claim import Claim, Row, Values
from turnout.decide.device import held
from turnout.models.lm import LM, LMConfig
from turnout.run.ranks.shard import mesh, shard
from turnout.types import BlockSize, Layout, Plan, Workload

# Billions of parameters, devices -> GB a device with zero = 1, 2 and 3.
_TABLE = {
    (7.5, 4): (52.5, 41.3, 30.0),
    (7.5, 16): (35.6, 21.6, 7.5),
    (7.5, 64): (31.4, 16.6, 1.88),
    (7.5, 256): (30.4, 15.4, 0.47),
    (7.5, 1024): (30.1, 15.1, 0.12),
    (128, 64): (536.0, 284.0, 32.0),
    (1000, 1024): (4012.0, 2014.0, 15.6),
}
_RANKS = 16


def zero() -> Claim:
    """The planner's bytes are ZeRO's table, and what torch's FSDP2 leaves on a device is what the planner says.

    The off arm shards nothing: every device holds 16 bytes a parameter.

    >>> zero().off
    'nothing sharded'

    Source: Rajbhandari et al., 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", figure 1
    and table 1. One of sixteen devices is played by torch's fake process group, whose other ranks do not exist.
    """
    off = "nothing sharded"
    return Claim(
        name="zero",
        statement="With optimizer state, gradients and parameters sharded over N devices each holds 16 Psi / N bytes.",
        source="Rajbhandari et al., 2020, ZeRO",
        off=off,
        switched={"table": "table, nothing sharded", "state": "state, nothing sharded"},
        rows=(
            Row(
                "largest distance from the paper's table of GB, in its last digit",
                "within",
                "table",
                "table, nothing sharded",
                off,
                bound=0.6,
                headline=False,
            ),
            Row(
                "bytes of weights and optimizer state on a device, relative to the planner's, less 1",
                "within",
                "state",
                "state, nothing sharded",
                off,
                bound=0.02,
            ),
        ),
        measure=_measure,
        seconds=2,
        note=f"{len(_TABLE)} rows of the table; FSDP2 on one of {_RANKS} ranks, weights in fp32 and AdamW",
        limits=(0.0, 1e6),
    )


def _measure(seed: int) -> Values:
    found = {}
    for name, zeros in (("table", (1, 2, 3)), ("table, nothing sharded", (0, 0, 0))):
        found[name] = max(
            abs(_gigabytes(params, ranks, zero) - gigabytes) / _digit(gigabytes)
            for (params, ranks), row in _TABLE.items()
            for zero, gigabytes in zip(zeros, row, strict=True)
        )
    found["state"] = abs(_state(seed, 3) - 1)
    found["state, nothing sharded"] = abs(_state(seed, 0) - 1)
    return found


def _digit(shown: float) -> float:
    """The worth of the last digit that a number is printed with."""
    return 10.0 ** -len(f"{shown:g}".partition(".")[2])


def _gigabytes(billions: float, ranks: int, zero: int) -> float:
    network = Workload((BlockSize(round(billions * 1e9), 0.0, 0.0),), width=1, seq=1, batch=ranks)
    plan = Plan(Layout(dp_shard=ranks, zero=zero))  # pyrefly: ignore[bad-argument-type]
    kinds = held(network, plan).by_kind
    return sum(kinds[kind] for kind in ("parameters", "gradients", "optimizer")) / 1e9


def _state(seed: int, zero: int) -> float:
    """What a device holds of weights and AdamW's moments under torch, over what zero=3 leaves it."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    width = 64 + 16 * (seed % 5)  # of a multiple of the ranks, or the first of them holds more
    lm = LM(LMConfig(vocab_size=64, width=width, layers=2, heads=4, hidden=4 * width, max_seq=8), seed=seed)
    whole = sum(p.numel() for p in lm.parameters())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=_RANKS)
    try:
        layout = Layout(dp_shard=_RANKS, zero=zero)  # pyrefly: ignore[bad-argument-type]
        shard(lm, layout, mesh(layout))
        adam = torch.optim.AdamW(lm.parameters(), foreach=False)
        for parameter in lm.parameters():
            parameter.grad = torch.zeros_like(parameter)
        adam.step()
        held_here = [*lm.parameters()]
        held_here += [value for state in adam.state.values() for value in state.values() if value.ndim]
        local = [getattr(each, "_local_tensor", each) for each in held_here]
        return sum(each.numel() for each in local) / (3 * whole / _RANKS)
    finally:
        dist.destroy_process_group()
