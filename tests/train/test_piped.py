"""Training through pipelines: losses, norms and weights of one process; checkpoints that other layouts go on from."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import spawn
from stand_in import VOCAB, exact, lines, tiny_config, tiny_tokens
from torch import Tensor

from turnout.decide.device import schedule_of, search
from turnout.errors import UnknownNameError, UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.piped import Piped
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import mesh, shard
from turnout.train import TrainConfig, train
from turnout.train.piped import Pipelined, _refuse_idle
from turnout.train.sharded import Sharded
from turnout.train.state import load
from turnout.train.team import Weights
from turnout.types.layout import Layout
from turnout.types.plan import Plan
from turnout.types.stage_costs import StageCosts

TWO, UNEVEN = Layout(pp=2, dp_shard=2), (1.0, 2.0, 1.0, 3.0)
PLANS = [
    Plan(TWO, microbatches=3),
    Plan(Layout(pp=2, dp_shard=2, ep=2), microbatches=3, schedule="ZBVZeroBubble"),
    Plan(Layout(pp=2, dp_shard=2, zero=1), microbatches=2, stages=(3, 1), recompute=True),
    Plan(Layout(pp=2, dp_replicate=2, zero=0), microbatches=2, schedule="ZB-H1", stages=(1, 3)),
    Plan(Layout(pp=4), microbatches=4, schedule="GPipe"),
    Plan(TWO, microbatches=3, actions=search(StageCosts(UNEVEN, UNEVEN, UNEVEN), 2, 3, tries=2).schedule),
]


def make() -> LM:
    learning: dict[str, Any] = {"router": "LossFree", "router_options": {"rate": 0.01}, "layers": (0, 2, 3)}
    moe = MoEConfig(num_experts=4, top_k=2, hidden=12, **learning)
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "width": 16, "layers": 4, "heads": 2, "max_seq": 32}
    return LM(LMConfig(**sizes, moe=moe, tie_embeddings=True), seed=5)


def configured(**fields: Any) -> TrainConfig:
    few = {"steps": 2, "batch": 12, "accumulate": 2, "lr": 3e-3, "clip": 0.3, "log_every": 1, "aux_weight": 0.1}
    return tiny_config(**{**few, "z_weight": 0.01, "checkpoint_every": 2, "eval_every": 2, **fields})


def whole(lm: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in lm.state_dict().items()}


def train_spread(ranks: Ranks, plan: Plan, out: Path, config: TrainConfig, **how: Any) -> dict[str, Tensor] | None:
    """Trains on these ranks; the weights in one piece, on the first."""
    lm, meshes = make(), mesh(plan.layout)
    if plan.layout.pp > 1:
        team: Sharded = Pipelined(ranks, meshes, Piped(lm, plan, meshes), make=make)
    else:
        team = Sharded(ranks, meshes, shard(lm, plan.layout, meshes, plan=plan))
    train(team.model, tiny_tokens(), config, out, run_json={}, quiet=True, team=team, **how)
    made = make() if ranks.is_first else None
    team.gather(made)
    return whole(made) if ranks.is_first else None


def gap(ones: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert ones.keys() == others.keys()
    return max((ones[name].float() - others[name].float()).abs().max().item() for name in ones)


def told(out: Path) -> list[tuple[float, ...]]:
    """What metrics.jsonl says of each step and of each evaluation."""
    names = ("loss", "grad_norm", "aux_loss", "z_loss", "max_vio", "bits_per_byte")
    return [tuple(line[name] for name in names if name in line) for line in lines(out)]


def every_plan(ranks: Ranks, folder: Path) -> list[Any]:
    found = [train_spread(ranks, plan, folder / str(at), configured()) for at, plan in enumerate(PLANS)]
    found.append(train_spread(ranks, PLANS[1], folder / "quiet", configured(aux_weight=0.0, z_weight=0.0)))
    return [*found, train_spread(ranks, PLANS[0], folder / "bf16", configured(dtype="bf16"))]


@pytest.mark.slow
def test_every_pipeline_trains_as_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    ones = {}
    for name, fields in {"one": {}, "quiet": {"aux_weight": 0.0, "z_weight": 0.0}, "bf16": {"dtype": "bf16"}}.items():
        lm = make()
        train(lm, tiny_tokens(), configured(**fields), tmp_path / f"one-{name}", run_json={}, quiet=True)
        ones[name] = whole(lm)
    assert gap(ones["one"], whole(make())) > 1e-3  # it moved, a hundred times the bound
    found = spawn(4, every_plan, tmp_path)[0]
    names = [*map(str, range(len(PLANS))), "quiet", "bf16"]
    for name, weights in zip(names, found, strict=True):
        one = name if name in ones else "one"
        rel, close = (3e-2, 2e-2) if name == "bf16" else (1e-5, 1e-5)
        for ours, theirs in zip(told(tmp_path / name), told(tmp_path / f"one-{one}"), strict=True):
            assert ours == pytest.approx(theirs, rel=rel, abs=rel / 10), name
        assert gap(weights, ones[one]) < close, name


# ---- checkpoints


def up_to(out: Path, copy: Path, step: int) -> None:
    """A copy of a run that was stopped after this step."""
    shutil.copytree(out, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


LONG: dict[str, Any] = {"steps": 6, "accumulate": 1, "checkpoint_every": 1, "keep_checkpoints": 9, "eval_every": 6}
# Each goes on from what another has written at a step.
CHAIN = {
    "pipeline": ("one", 1, Plan(Layout(pp=2), microbatches=3)),
    "again": ("pipeline", 3, Plan(Layout(pp=2), microbatches=3)),
    "shards": ("pipeline", 2, Plan(Layout(dp_shard=2))),
    "folded": ("shards", 4, Plan(Layout(pp=2), microbatches=4, schedule="ZBVZeroBubble")),
}


def go_on(ranks: Ranks, folder: Path) -> None:
    for name, (before, step, plan) in CHAIN.items():
        if ranks.is_first:
            up_to(folder / before, folder / name, step)
        torch.distributed.barrier()
        train_spread(ranks, plan, folder / name, configured(**LONG), resume=True)
        torch.distributed.barrier()


@pytest.mark.slow
def test_checkpoints_go_from_pipelines_to_shards_to_one_process_and_back(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one = make()
    train(one, tiny_tokens(), configured(**LONG), tmp_path / "one", run_json={}, quiet=True)
    spawn(2, go_on, tmp_path)
    up_to(tmp_path / "folded", tmp_path / "last", 5)
    for name in (*CHAIN, "last"):
        if name == "last":
            train(make(), tiny_tokens(), configured(**LONG), tmp_path / name, run_json={}, quiet=True, resume=True)
        for ours, theirs in zip(told(tmp_path / name), told(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), name
    assert exact(tmp_path / "again") == exact(tmp_path / "pipeline"), "another run under the same plan"
    files = {path.name for path in (tmp_path / "folded/checkpoints/step-00000006").iterdir()}
    assert {"model-00001-of-00002.safetensors", "optimizer-00002-of-00002.safetensors"} <= files
    found = make()  # whole, under the names of the model
    optimizer = torch.optim.AdamW(found.parameters())
    load(tmp_path / "folded/checkpoints/step-00000006", found, optimizer)
    last = make()
    load(tmp_path / "last/checkpoints/step-00000006", last, torch.optim.AdamW(last.parameters()))
    assert gap(whole(found), whole(one)) < 1e-5
    assert gap(whole(last), whole(one)) < 1e-5
    assert {len(state) for state in optimizer.state.values()} == {3}
    assert len(optimizer.state) == len(list(found.parameters()))


# ---- refusals


def test_a_plan_s_schedule_is_the_one_it_has_in_full_or_names() -> None:
    found = search(StageCosts.even(2), 2, 4, tries=2).schedule
    assert schedule_of(Plan(Layout(pp=2), microbatches=4, actions=found)) is found
    assert schedule_of(Plan(Layout(pp=2), microbatches=4, schedule="ZB-H1")).splits_backward
    with pytest.raises(UnknownNameError, match="1F1B"):
        schedule_of(Plan(Layout(pp=2), schedule="1F1C"))
    with pytest.raises(UsageError, match="stages must be the 2 of the schedule 1F1B"):
        schedule_of(Plan(Layout(pp=2), stages=(1, 1, 1, 1)))
    with pytest.raises(UsageError, match="recompute must be False with ZB"):
        schedule_of(Plan(Layout(pp=2), microbatches=4, schedule="ZB-H1", recompute=True))


def refused(ranks: Ranks) -> list[str]:
    """What each of these says, on this rank."""
    said = []
    plan = Plan(Layout(pp=2), microbatches=2)
    meshes = mesh(plan.layout)
    moe = MoEConfig(num_experts=4, top_k=2, hidden=12, router_options={"capacity_factor": 1.0})
    tight = LM(LMConfig(vocab_size=VOCAB, width=16, layers=2, heads=2, max_seq=32, moe=moe))
    dense = LM(LMConfig(vocab_size=VOCAB, width=16, layers=4, heads=2, max_seq=32))
    team = Pipelined(ranks, meshes, Piped(dense, plan, meshes), make=make)
    ids = torch.zeros(3, 4, dtype=torch.long)
    for action in (
        lambda: Piped(tight, plan, meshes),
        lambda: team.passed(ids, ids, None, Weights(0.0, 0.0, 12, 1), tokens=12, seed=0),
    ):
        with pytest.raises(UsageError) as error:
            action()
        said.append(str(error.value))
    return said


@pytest.mark.slow
def test_what_a_pipeline_does_not_train_is_refused() -> None:
    for tight, uneven in spawn(2, refused):
        assert "a router must route each token by itself" in tight
        assert "capacity_factor=1.0" in tight
        assert "batch must come out even in 2 microbatches" in uneven
        assert "pass batch=4" in uneven
    with pytest.raises(UsageError, match="got none on rank 2"):
        _refuse_idle([3, 1, 0])
