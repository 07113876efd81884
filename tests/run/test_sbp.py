"""OneFlow's split, broadcast and partial-value tensors are DTensor's placements: each change and its collective."""

from collections.abc import Mapping

import pytest
import torch
import torch.distributed as dist
from processes import spawn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode

from turnout.run.ranks.processes import Ranks

S0, S1, B, P = Shard(0), Shard(1), Replicate(), Partial()
# What OneFlow boxes with, per change, as docs/guides/scale.md has it: nothing where it is local. On a CPU torch puts an
# all-gather, of which each rank keeps its part, in the place of DTensor's all-to-all.
TABLE: dict[tuple[str, Placement, Placement], str] = {
    ("S(i) -> S(i)", S0, S0): "",
    ("S(i) -> S(j)", S0, S1): "all_gather",
    ("S(i) -> B", S0, B): "all_gather",
    ("B -> S(i)", B, S1): "",
    ("B -> B", B, B): "",
    ("P -> S(i)", P, S0): "reduce_scatter",
    ("P -> B", P, B): "all_reduce",
    ("P -> P", P, P): "",
}


def _kind(counts: Mapping[object, int]) -> str:
    names = sorted({str(one).split(".")[-1] for one, count in counts.items() if count})
    assert sum(counts.values()) <= 1, counts
    return names[0] if names else ""


def _changes(ranks: Ranks) -> list[str]:
    wrong = []
    mesh = init_device_mesh("cpu", (ranks.world,))
    whole = torch.arange(32.0).view(8, 4)
    for (name, before, after), collective in TABLE.items():
        if isinstance(before, Partial):
            own = whole * (ranks.rank + 1) / sum(range(1, ranks.world + 1))
        elif isinstance(before, Shard):
            own = whole.tensor_split(ranks.world, dim=before.dim)[ranks.rank].contiguous()
        else:
            own = whole
        tensor = DTensor.from_local(own, mesh, [before])
        with CommDebugMode() as counted:
            changed = tensor.redistribute(placements=[after])
        said = _kind(counted.get_comm_counts())
        if not (said.startswith(collective) if collective else said == ""):
            wrong.append(f"{name}: {said or 'nothing'}, not {collective or 'nothing'}")
        local = changed.to_local()
        if isinstance(after, Partial):
            local = local.clone()
            dist.all_reduce(local)
            want = whole
        elif isinstance(after, Shard):
            want = whole.tensor_split(ranks.world, dim=after.dim)[ranks.rank]
        else:
            want = whole
        if not torch.allclose(local, want, rtol=1e-6):
            wrong.append(f"{name}: other numbers")
    for before in (B, S0):  # OneFlow has both; DTensor leaves them to its own derivatives
        with pytest.raises(RuntimeError, match="Partial is for internal use only"):
            DTensor.from_local(whole, mesh, [before]).redistribute(placements=[P])
    return wrong


@pytest.mark.slow
def test_each_change_costs_the_collective_that_sbp_says() -> None:
    """On two ranks, with the numbers that come out."""
    assert spawn(2, _changes) == [[], []]
