"""Training through pipelines: losses, norms and weights of one process; checkpoints that other layouts go on from."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import spawn
from stand_in import VOCAB, lines, tiny_config, tiny_tokens
from torch import Tensor

from turnout.decide.device import search, schedule_of
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.piped import Piped
from turnout.run.processes import Ranks
from turnout.run.shard import mesh, shard
from turnout.train import TrainConfig, train
from turnout.train.piped import Pipelined
from turnout.train.sharded import Sharded
from turnout.types.layout import Layout
from turnout.types.plan import Plan

TWO = Layout(pp=2, dp_shard=2)
PLANS = [
    Plan(TWO, microbatches=3),
    Plan(Layout(pp=2, dp_shard=2, ep=2), microbatches=3, schedule="ZBVZeroBubble"),
    Plan(Layout(pp=2, dp_shard=2, zero=1), microbatches=2, stages=(3, 1), recompute=True),
    Plan(Layout(pp=2, dp_replicate=2, zero=0), microbatches=2, schedule="ZB-H1", stages=(1, 3)),
    Plan(Layout(pp=4), microbatches=4, schedule="GPipe"),
]


def make() -> LM:
    moe = MoEConfig(num_experts=4, top_k=2, hidden=12, router="LossFree", router_options={"rate": 0.01}, layers=(0, 2, 3))
    sizes: dict[str, Any] = {"vocab_size": VOCAB, "width": 16, "layers": 4, "heads": 2, "max_seq": 32}
    return LM(LMConfig(**sizes, moe=moe, tie_embeddings=True), seed=5)


def configured(**fields: Any) -> TrainConfig:
    few = {"steps": 3, "batch": 12, "accumulate": 2, "lr": 3e-3, "clip": 0.3, "log_every": 1, "aux_weight": 0.1}
    return tiny_config(**{**few, "z_weight": 0.01, "checkpoint_every": 3, "eval_every": 3, **fields})


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
    assert gap(ones["one"], whole(make())) > 5e-3  # it moved
    found = spawn(4, every_plan, tmp_path)[0]
    names = [*map(str, range(len(PLANS))), "quiet", "bf16"]
    for name, weights in zip(names, found, strict=True):
        one = name if name in ones else "one"
        rel, close = (3e-2, 2e-2) if name == "bf16" else (1e-5, 1e-5)
        for ours, theirs in zip(told(tmp_path / name), told(tmp_path / f"one-{one}"), strict=True):
            assert ours == pytest.approx(theirs, rel=rel, abs=rel / 10), name
        assert gap(weights, ones[one]) < close, name
