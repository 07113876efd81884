"""What ``turnout plan`` prints is what runs: its command, its step, its page; and what cannot run is not planned."""

import dataclasses
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import transformers

from turnout.cli import main
from turnout.errors import UnknownNameError, UsageError
from turnout.models import LM, LMConfig, MoEConfig
from turnout.recipes import parity, spread
from turnout.recipes.layouts import Planned, plan_model, run_of
from turnout.run.ranks.shard import shard
from turnout.types import Cluster, Layout, Plan


def _with(found: Planned, plan: Plan) -> Planned:
    return dataclasses.replace(found, choices=(dataclasses.replace(found.choices[0], plan=plan),))


@pytest.mark.parametrize(("devices", "rank", "count"), [(12, 0, "8"), (12, 1, "4"), (16, 1, "8"), (3, 0, "3")])
def test_a_node_starts_as_many_processes_as_the_plan_has_on_it(devices: int, rank: int, count: str) -> None:
    cluster = Cluster(nodes=2, devices_per_node=8)
    command = plan_model("tiny", cluster, overrides=["batch=48"], devices=devices, top=1).command()
    launch = command.partition(" -m turnout")[0].replace("torchrun", "echo")
    said = subprocess.run(
        ["sh", "-c", launch], check=True, env={"RANK": str(rank), "HOST": "h"}, capture_output=True, text=True
    )
    assert said.stdout.split()[:2] == ["--nproc-per-node", count]


def test_a_step_in_parts_is_one_whose_gradients_are_added_up() -> None:
    found = plan_model("tiny", Cluster(devices_per_node=2), overrides=["batch=2", "train.accumulate=4"], top=1)
    command = _with(found, Plan(Layout(dp_shard=2), microbatches=4)).command()
    assert "batch=2 train.accumulate=4 --plan" in command
    command = _with(found, Plan(Layout(dp_shard=2), microbatches=2)).command()
    assert "tiny batch=4 accumulate=2 --plan" in command
    command = _with(found, Plan(Layout(pp=2), microbatches=4)).command()
    assert "tiny batch=8 accumulate=1 --plan" in command


def test_a_plan_in_parts_is_not_trained_whole() -> None:
    run, plan = run_of("tiny"), Plan(Layout(dp_shard=2), microbatches=2)
    with pytest.raises(UsageError, match=r"accumulate must be at least 2, .* got 1. Nearest fix: pass batch=4 accumul"):
        spread.spread(run, "nowhere", plan=plan)


def test_a_folder_is_trained_as_it_was_planned(tmp_path: Path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaConfig(**sizes, intermediate_size=16).save_pretrained(tmp_path)  # pyrefly: ignore
    for name in (str(tmp_path), str(tmp_path / "config.json")):
        found = plan_model(name, Cluster(), overrides=["batch=4"])
        line = shlex.split(found.command())
        assert line[line.index("--from") + 1] == str(tmp_path)
        assert {"batch=4", f"seq={found.run.train.seq}", f"dtype={found.run.train.dtype}"} <= set(line)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["only=router"], "only must be all where many devices train"),
        (["router=ExpertChoice"], "router must route each token by itself"),
        (["router=Switch", "top_k=1", 'router_options={"capacity_factor": 1.0}'], "router must route each token"),
    ],
)
def test_what_many_devices_do_not_train_is_not_planned_for_them(overrides: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plan_model("tiny", Cluster(devices_per_node=2), overrides=overrides)
    assert plan_model("tiny", Cluster(devices_per_node=2), overrides=overrides, devices=1).choices


@pytest.mark.parametrize(("devices", "drawn"), [(2, True), (1, False)])
def test_the_page_is_written(
    devices: int, drawn: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cluster.toml").write_text("devices_per_node = 2\n")
    asked = ["plan", "tiny", "--cluster", "cluster.toml", "--devices", str(devices), "--html", "page.html"]
    assert main(asked) == 0
    page = Path("page.html").read_text()
    assert "page: page.html" in capsys.readouterr().out
    assert "simulated" in page and "compute" in page
    assert bool(re.search("device 1</text>", page)) == drawn


_KEPT = ([], ["attention_softcap=30.0"], ["norm_place=both"], ["window=32"], ["window=32", "sinks=True"])
_KEPT += (["moe.shared_hidden=64", "shared_gate=True"], ["router=PreGate"], ["qk_norm=head"])
_KEPT += (["router=DenseToSparse", "top_k=1"], ["seq=128", "max_seq=128"])


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("overrides", _KEPT, ids=" ".join)
def test_what_a_step_keeps_is_what_was_foreseen(overrides: list[str], dtype: str) -> None:
    found = plan_model("tiny", Cluster(), overrides=["batch=2", f"dtype={dtype}", *overrides])
    run, kept = found.run, {}
    lm = LM(run.model, seed=0).train()
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage  # held, so that no other comes to lie there
        return tensor

    id_BS = torch.randint(run.model.vocab_size, (2, run.train.seq), generator=torch.Generator().manual_seed(0))
    bf16 = torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bf16")
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), bf16:
        lm.loss(id_BS, id_BS)
    measured = sum(storage.nbytes() for storage in kept.values())
    assert 0.93 * measured < found.choices[0].held.by_kind["activations"] < 1.06 * measured


def test_a_text_where_a_number_belongs_and_a_misspelt_key(tmp_path: Path) -> None:
    file = tmp_path / "cluster.toml"
    file.write_text('nodes = "4"\n')
    with pytest.raises(UsageError, match=r"must be a whole number in .*; got '4'"):
        Cluster.open(file)
    file.write_text("nodez = 4\n")
    with pytest.raises(
        UnknownNameError, match=r"cluster.toml \(misspelt, or of another version\). Did you mean 'nodes'"
    ):
        Cluster.open(file)


def test_a_router_that_chooses_among_tokens_meets_no_part_of_a_batch() -> None:
    moe = MoEConfig(num_experts=2, top_k=1, hidden=4, router="ExpertChoice")
    lm, layout = LM(LMConfig(vocab_size=8, width=4, layers=2, heads=1, moe=moe)), Layout(pp=2)
    with pytest.raises(UsageError, match="each part of it has others"):
        shard(lm, layout, None, plan=Plan(layout, microbatches=2))  # pyrefly: ignore[bad-argument-type]


def test_a_schedule_that_there_is_not_is_refused_before_processes_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("turnout.recipes.parity.spawned", lambda *_: pytest.fail("started"))
    with pytest.raises(UnknownNameError, match="Did you mean '1F1B'"):
        parity.parity(Plan(Layout(pp=2), schedule="1f1b", microbatches=2))
