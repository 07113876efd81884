"""Training on many processes: losses and weights of one, in every layout; checkpoints that any number goes on from."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import spawn
from stand_in import VOCAB, exact, lines, tiny_config, tiny_tokens
from torch import Tensor

from turnout.errors import UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.run.ranks.exchange import own_part
from turnout.run.ranks.processes import Ranks
from turnout.run.ranks.shard import mesh, shard
from turnout.train import TrainConfig, load_balance_loss, parts, router_z_loss, train
from turnout.train.balance import Whole, demand
from turnout.train.data import Batch
from turnout.train.sharded import Sharded
from turnout.types import Routing
from turnout.types.layout import Layout
from turnout.types.placement import Placement
from turnout.types.plan import Plan

LAYOUTS = [
    Layout(dp_replicate=4, zero=0),
    Layout(dp_shard=4, zero=1),
    Layout(dp_shard=4, zero=2),
    Layout(dp_shard=4, zero=3),
    Layout(dp_shard=4, ep=2),
    Layout(dp_shard=4, ep=4, zero=2),
    Layout(dp_replicate=2, dp_shard=2),
]


def make(router: str = "LossFree") -> LM:
    options = {"rate": 0.01} if router == "LossFree" else {}
    moe = MoEConfig(num_experts=4, top_k=2, hidden=12, router=router, router_options=options)
    return LM(LMConfig(vocab_size=VOCAB, width=16, layers=2, heads=2, max_seq=32, moe=moe, tie_embeddings=True), seed=5)


def configured(**fields: Any) -> TrainConfig:
    few = {"steps": 6, "batch": 12, "accumulate": 2, "lr": 3e-3, "clip": 0.3, "log_every": 1, "aux_weight": 0.1}
    return tiny_config(**{**few, "z_weight": 0.01, "checkpoint_every": 2, "keep_checkpoints": 9, **fields})


def whole(lm: LM) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in lm.state_dict().items()}


def train_spread(ranks: Ranks, layout: Layout, out: Path, config: TrainConfig, **how: Any) -> dict[str, Tensor] | None:
    """Trains on these ranks; the weights in one piece, on the first."""
    lm, made = make(), make()
    meshes = mesh(layout)
    shard(lm, layout, meshes, plan=Plan(layout))
    train(lm, tiny_tokens(), config, out, run_json={}, quiet=True, team=Sharded(ranks, meshes, lm), **how)
    parts.gather(parts.pieces(lm, {}), made if ranks.is_first else None)
    return whole(made) if ranks.is_first else None


def every_layout(ranks: Ranks, folder: Path) -> list[Any]:
    few = {"steps": 4, "checkpoint_every": 4}
    found = [train_spread(ranks, layout, folder / str(at), configured(**few)) for at, layout in enumerate(LAYOUTS)]
    return [*found, train_spread(ranks, LAYOUTS[4], folder / "bf16", configured(**few, dtype="bf16"))]


def gap(ones: dict[str, Tensor], others: dict[str, Tensor]) -> float:
    assert ones.keys() == others.keys()
    return max((ones[name].float() - others[name].float()).abs().max().item() for name in ones)


def told(out: Path) -> list[tuple[float, ...]]:
    """What metrics.jsonl says of each step and of each evaluation."""
    names = ("loss", "grad_norm", "aux_loss", "z_loss", "max_vio", "bits_per_byte")
    return [tuple(line[name] for name in names if name in line) for line in lines(out)]


@pytest.mark.slow
def test_every_layout_trains_as_one_process(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    one, rounded = make(), make()
    train(one, tiny_tokens(), configured(steps=4), tmp_path / "one", run_json={}, quiet=True)
    train(rounded, tiny_tokens(), configured(steps=4, dtype="bf16"), tmp_path / "one-bf16", run_json={}, quiet=True)
    assert gap(whole(one), whole(make())) > 5e-3  # it moved
    *found, bf16 = spawn(4, every_layout, tmp_path)[0]
    for at, (layout, weights) in enumerate(zip(LAYOUTS, found, strict=True)):
        here = f"{layout}: "
        for ours, theirs in zip(told(tmp_path / str(at)), told(tmp_path / "one"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), here
        assert gap(weights, whole(one)) < 1e-5, here
    for ours, theirs in zip(told(tmp_path / "bf16"), told(tmp_path / "one-bf16"), strict=True):
        assert ours == pytest.approx(theirs, rel=3e-2, abs=3e-2)
    assert gap(bf16, whole(rounded)) < 2e-2


# ---- checkpoints


def go_on(ranks: Ranks, layout: Layout, out: Path) -> dict[str, Tensor] | None:
    return train_spread(ranks, layout, out, configured(), resume=True)


def begin_and_go_on(ranks: Ranks, folder: Path) -> list[dict[str, Tensor] | None]:
    found = [train_spread(ranks, LAYOUTS[4], folder / "four", configured())]
    if ranks.is_first:
        up_to(folder / "four", folder / "again", 4)
    torch.distributed.barrier()
    return [*found, go_on(ranks, LAYOUTS[4], folder / "again")]


def up_to(out: Path, copy: Path, step: int) -> None:
    """A copy of a run that was stopped after this step."""
    shutil.copytree(out, copy)
    for path in (copy / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


@pytest.mark.slow
def test_checkpoints_go_on_with_any_number_of_ranks(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    weights, again = spawn(4, begin_and_go_on, tmp_path)[0]
    assert exact(tmp_path / "again") == exact(tmp_path / "four"), "another run under the same layout"
    assert gap(weights, again) == 0
    names = {path.name for path in (tmp_path / "four/checkpoints/step-00000006").iterdir()}
    assert {"model-00001-of-00004.safetensors", "optimizer-00004-of-00004.safetensors"} <= names

    up_to(tmp_path / "four", tmp_path / "two", 2)
    two = spawn(2, go_on, Layout(dp_shard=2, zero=2), tmp_path / "two")[0]
    up_to(tmp_path / "two", tmp_path / "three", 4)
    assert len(list((tmp_path / "three/checkpoints/step-00000004").glob("model-*-of-00002.*"))) == 2
    three = spawn(3, go_on, Layout(dp_replicate=3, zero=0), tmp_path / "three")[0]
    up_to(tmp_path / "three", tmp_path / "one", 4)
    one = make()
    train(one, tiny_tokens(), configured(), tmp_path / "one", run_json={}, quiet=True, resume=True)
    up_to(tmp_path / "one", tmp_path / "four-again", 4)
    four = spawn(4, go_on, Layout(dp_shard=4, zero=3), tmp_path / "four-again")[0]
    for name, found in {"two": two, "three": three, "one": whole(one), "four-again": four}.items():
        for ours, theirs in zip(told(tmp_path / name), told(tmp_path / "four"), strict=True):
            assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6), name
        assert gap(found, weights) < 1e-5, name


# ---- pieces


@pytest.mark.parametrize("seed", range(3))
def test_parts_of_the_balance_losses_add_up(seed: int) -> None:
    """Each process's share, with what all rows chose: values and gradients of one process with all rows."""
    generator = torch.Generator().manual_seed(seed)
    logit_TE = torch.randn(14, 5, generator=generator).requires_grad_()
    real_T = torch.rand(14, generator=generator) < 0.7

    def routed(rows: slice) -> Routing:
        score_TE = logit_TE[rows].softmax(1)
        picked = score_TE.topk(2)
        made = Routing.from_topk(picked.indices, picked.values, num_experts=5, score_TE=score_TE)
        made = made.keep(real_T[rows][made.token_R])
        return dataclasses.replace(made, logit_TE=logit_TE[rows], real_T=real_T[rows])

    everything, shares = routed(slice(0, 14)), [routed(slice(0, 3)), routed(slice(3, 14))]
    whole = Whole(sum(map(demand, shares)), real_T.sum())  # pyrefly: ignore[bad-argument-type]
    for loss in (load_balance_loss, router_z_loss):
        (expected,) = torch.autograd.grad(loss(everything), logit_TE)
        total = sum(loss(share, whole=whole) for share in shares)
        (found,) = torch.autograd.grad(total, logit_TE)
        torch.testing.assert_close(total, loss(everything))
        torch.testing.assert_close(found, expected)


def one_part(ranks: Ranks) -> str:
    layout = Layout(dp_shard=2)
    lm, meshes = make(), mesh(layout)
    with pytest.raises(UsageError, match="which nobody shares"):
        Sharded(ranks, meshes, lm)
    shard(lm, layout, meshes, plan=Plan(layout))
    team = Sharded(ranks, meshes, lm)
    batch = Batch(torch.arange(4)[:, None], torch.arange(4)[:, None])
    assert team.part(batch).id_BS.flatten().tolist() == [2 * ranks.rank, 2 * ranks.rank + 1]
    with pytest.raises(UsageError, match="batch must be a multiple of the 2 ranks"):
        team.part(Batch(torch.zeros(3, 1), torch.zeros(3, 1)))
    return team.heard("SIGTERM" if ranks.rank else None) or ""


@pytest.mark.slow
def test_what_is_a_rank_s_own() -> None:
    assert spawn(2, one_part) == ["SIGTERM"] * 2


PLACED = [
    Placement(2, (4, 4), ((2, 0, 3, 1), (0, 1, 2, 3)), ((0, 0, 1, 1),) * 2),
    Placement(2, (4, 4), ((0, 1, 2, 0, 2, 3),) * 2, ((0, 0, 0, 1, 1, 1),) * 2),
]


def placed_elsewhere(ranks: Ranks) -> list[tuple[float, float, float]]:
    """Under each placement: two norms, and how far the gathered weights are from those that were spread."""
    found, layout, ids = [], Layout(dp_shard=2, ep=2), torch.randint(VOCAB, (4, 9), generator=torch.manual_seed(3))
    meshes = mesh(layout)
    for placement in PLACED:
        lm, one, made = make("TopK"), make("TopK"), LM(make("TopK").config, seed=9)
        (one.loss(ids[:, :-1], ids[:, 1:]).nats / 32).backward()
        shard(lm, layout, meshes, plan=Plan(layout, placement=placement))
        team, parameters = Sharded(ranks, meshes, lm), list(lm.parameters())
        own = ids.chunk(2)[meshes.data_rank]
        (lm.loss(own[:, :-1], own[:, 1:]).nats / 32).backward()
        team.collect(parameters)
        norm = team.norm([team.held(p) for p in parameters])
        want = torch.nn.utils.get_total_norm([p.grad for p in one.parameters() if p.grad is not None])
        held = parts.pieces(lm, {})
        parts.gather(held, made)
        off = [float(p.part(p.whole()).ne(own_part(p.tensor.detach())).sum()) for p in held]
        found.append((float(norm), float(want), gap(whole(made), whole(one)) + sum(off)))
    return found


def test_experts_placed_elsewhere_count_once_and_are_saved_in_their_order() -> None:
    for norm, want, off in spawn(2, placed_elsewhere)[0]:
        assert norm == pytest.approx(want, rel=1e-5) and not off
