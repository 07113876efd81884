"""Training whose blocks a schedule plays: losses and weights of one process; checkpoints that any layout reads."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import spawn
from stand_in import exact, lines, tiny_tokens
from test_sharded import configured, gap, make, told, train_spread, up_to, whole
from torch import Tensor

from turnout.decide.device import block_schedule
from turnout.models.block_tasks import BlockTasks
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import mesh, shard
from turnout.train import parts, train
from turnout.train.overlapping import Overlapping
from turnout.types import BlockCosts, BlockSchedule
from turnout.types.layout import Layout
from turnout.types.plan import Plan

LAYOUTS = [
    (Layout(dp_shard=4, ep=4, zero=0), "turnout"),
    (Layout(dp_shard=4, ep=2, zero=0), "flowmoe"),
    (Layout(dp_replicate=2, dp_shard=2, ep=2, zero=0), "tutel"),
    (Layout(dp_shard=4, ep=1, zero=0), "turnout"),
]


def planned(layout: Layout, method: str, **how: Any) -> Plan:
    """With gradients' pieces of ``make``'s blocks."""
    block = BlockTasks(make().blocks[0], 0)  # pyrefly: ignore[bad-argument-type]
    dense, expert = (sum(p.numel() * 4 for p in each) for each in (block.dense, block.expert))
    copies = layout.data_ranks // layout.ep > 1
    sizes = {"attention": 1.0, "experts": 1.0, "dispatch": 0.6, "reduce": 0.7, "expert_reduce": 0.5, "start": 0.02}
    costs = BlockCosts.even(**sizes, most_chunks=3, rows=12)
    fields = {"dense_bytes": dense, "expert_bytes": expert // layout.ep if copies else 0, "sums": False, **how}
    body = costs.to_json_dict() | fields
    return Plan(layout, overlap=block_schedule(BlockCosts.from_json_dict(body), blocks=2, method=method))


def train_overlapped(ranks: Ranks, plan: Plan, out: Path, config: Any, **how: Any) -> dict[str, Tensor] | None:
    lm, made = make(), make()
    meshes = mesh(plan.layout)
    shard(lm, plan.layout, meshes, plan=plan)
    assert plan.overlap is not None
    team = Overlapping(ranks, meshes, lm, plan.overlap)
    train(lm, tiny_tokens(), config, out, run_json={}, quiet=True, team=team, **how)
    team.close()
    parts.gather(parts.pieces(lm, {}), made if ranks.is_first else None)
    return whole(made) if ranks.is_first else None


def on_four(ranks: Ranks, folder: Path, plans: list[Plan]) -> list[Any]:
    found = []
    for at, plan in enumerate(plans):
        found.append(train_overlapped(ranks, plan, folder / str(at), configured(steps=4)))
    if ranks.is_first:
        up_to(folder / "1", folder / "again", 2)
        up_to(folder / "1", folder / "elsewhere", 2)
    torch.distributed.barrier()
    found.append(train_overlapped(ranks, plans[1], folder / "again", configured(steps=4), resume=True))
    found.append(train_spread(ranks, Layout(dp_shard=4, ep=4), folder / "elsewhere", configured(steps=4), resume=True))
    return found


@pytest.mark.slow
def test_played_blocks_train_as_one_process_and_go_on_anywhere(tmp_path: Path) -> None:
    """Accumulation, clipping, balance losses and learning routers; Tutel's, FlowMoE's and our schedules."""
    torch.set_num_threads(1)
    one = make()
    train(one, tiny_tokens(), configured(steps=4), tmp_path / "one", run_json={}, quiet=True)
    assert any(line.get("grad_norm", 0) > 0.3 for line in lines(tmp_path / "one")), "nothing was clipped"
    *found, again, elsewhere = spawn(4, on_four, tmp_path, [planned(*each) for each in LAYOUTS])[0]
    names = [*map(str, range(len(LAYOUTS))), "again", "elsewhere"]
    for name, weights in zip(names, [*found, again, elsewhere], strict=True):
        for ours, theirs in zip(told(tmp_path / name), told(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), name
        assert gap(weights, whole(one)) < 1e-5, name
    assert gap(again, found[1]) == 0
    assert exact(tmp_path / "again") == exact(tmp_path / "1")
    up_to(tmp_path / "1", tmp_path / "alone", 2)
    alone = make()
    train(alone, tiny_tokens(), configured(steps=4), tmp_path / "alone", run_json={}, quiet=True, resume=True)
    assert gap(whole(alone), whole(one)) < 1e-5
    for line in (line for line in lines(tmp_path / "0") if line["kind"] == "train"):
        assert line["pass_s"] > 0, line
        assert 0 <= line["hidden"] <= 1, line


def test_the_schedule_of_a_plan_comes_back() -> None:
    plan = planned(*LAYOUTS[1])
    assert isinstance(plan.overlap, BlockSchedule)
    assert Plan.from_json_dict(json.loads(json.dumps(plan.to_json_dict()))) == plan
