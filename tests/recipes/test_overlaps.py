"""``turnout plan --overlap``: a schedule of this very model's pieces, which ``turnout train`` plays."""

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest
from processes import outcomes

from turnout.cli.main import main
from turnout.errors import UsageError
from turnout.measure import simulate_block
from turnout.recipes import tiny
from turnout.recipes.execute import execute
from turnout.recipes.layouts import plan_model
from turnout.recipes.run import Run
from turnout.recipes.spread import spread
from turnout.train.metrics import read_metrics
from turnout.types import Cluster
from turnout.types.plan import Plan

FIELDS = ["width=16", "layers=2", "heads=2", "kv_heads=1", "vocab_size=300", "seq=16", "max_seq=16", "batch=8"]
FIELDS += ["num_experts=4", "moe.hidden=8"]
MORE = ["eval_tokens=64", "log_every=1", "checkpoint_every=2", "steps=3", "held_out=0.3"]
# A slow wire, and a chip as slow: what is hidden is worth it.
CLUSTER = Cluster(devices_per_node=2, memory_bytes=1e9, flops_per_s=2e8, intra_bytes_per_s=4e6, intra_latency_s=1e-4)
TOML = "devices_per_node = 2\nmemory_bytes = 1e9\nflops_per_s = 2e8\nintra_bytes_per_s = 4e6\nintra_latency_s = 1e-4\n"


def test_a_schedule_hides_what_was_waited_for() -> None:
    found = plan_model("tiny", CLUSTER, overrides=FIELDS, overlap=True, top=3)
    assert found.overlap is not None
    plan, makespans = found.overlap.choice.plan, found.overlap.makespans
    assert (plan.layout.ep, plan.layout.zero, plan.layout.pp) == (2, 0, 1)
    assert plan.overlap is not None
    assert min(makespans.values()) == makespans["turnout"] == plan.foreseen_s < 0.9 * makespans["none"]
    assert 0 < found.overlap.choice.pace.seconds["exposed wire"] < sum(found.overlap.waits.values())
    assert "experts' exchange" not in found.overlap.choice.pace.seconds
    said = found.table()
    for words in ("with the block schedule", "Tutel ", "FSMoE ", "FlowMoE ", "ours ", "attention in ", "pieces: "):
        assert words in said, words
    body = json.loads(found.to_json())
    assert body["makespans"] == dict(makespans)
    assert [choice["overlapped"] for choice in body["choices"]].count(True) == 1


def test_the_command_writes_the_plan_that_has_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.toml").write_text(TOML)
    where = ["--cluster", str(tmp_path / "c.toml"), "--out", str(tmp_path / "plan.json")]
    assert main(["plan", "tiny", *FIELDS, *where, "--overlap"]) == 0
    assert Plan.open(tmp_path / "plan.json").overlap is not None
    assert f"--plan {tmp_path / 'plan.json'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (["moe.router=Switch", "moe.top_k=1"], "block 0 must have a router that looks at one token at a time"),
        (["dtype=bf16"], "--overlap must be of fp32 in turnout plan; got dtype=bf16"),
    ],
)
def test_what_no_schedule_is_played_for_is_refused(fields: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        plan_model("tiny", CLUSTER, overrides=[*FIELDS, *fields], overlap=True)


def test_a_run_in_bf16_is_refused_before_any_work(tmp_path: Path) -> None:
    """Also where the plan's file came from a run in fp32; no rank has met another by then."""
    plan = plan_model("tiny", CLUSTER, overrides=FIELDS, overlap=True).overlap
    assert plan is not None
    run = tiny().scaled([*FIELDS, *MORE, "dtype=bf16"])
    with pytest.raises(UsageError, match=r"dtype must be fp32 there in turnout train; got bf16, with a plan that has"):
        spread(run, tmp_path / "x", plan=plan.choice.plan)
    assert not (tmp_path / "x").exists()


def test_one_device_has_nothing_to_overlap() -> None:
    with pytest.raises(UsageError, match="must hold a layout with ep > 1"):
        plan_model("tiny", Cluster(memory_bytes=1e9), overrides=FIELDS, overlap=True)


def small(text: Path) -> Run:
    return tiny().with_domains({"text": (str(text),)}).scaled([*FIELDS, *MORE])


def run_planned(rank: int, text: Path, out: Path, plan: Plan) -> str:
    with contextlib.redirect_stderr(said := io.StringIO()):
        spread(small(text), out, plan=plan)
    return said.getvalue()


@pytest.mark.slow
def test_a_planned_schedule_trains_as_one_process(tmp_path: Path) -> None:
    """From ``turnout plan`` to ``turnout train``: the same losses, and what a pass took beside what was foreseen."""
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"Turnout number {number} sends a train down one of several tracks. " * 9)
    plan = plan_model("tiny", CLUSTER, overrides=FIELDS, overlap=True).overlap
    assert plan is not None
    first, second = outcomes(2, run_planned, text, tmp_path / "two", plan.choice.plan, group=False)
    assert first.error == second.error == "", first
    said = first.value
    assert "a pass through the blocks and back took " in said
    assert " ms were foreseen; " in said
    execute(small(text), tmp_path / "one", quiet=True)
    ours, theirs = (_losses(tmp_path / name / "metrics.jsonl") for name in ("two", "one"))
    assert len(ours) == 3
    assert ours == pytest.approx(theirs, rel=1e-5)


def _losses(path: Path) -> list[Any]:
    return [line["loss"] for line in read_metrics(path) if line["kind"] == "train"]


def test_the_foreseen_makespan_is_the_simulators() -> None:
    from turnout.decide.device.overlap_costs import overlap_costs

    found = plan_model("tiny", CLUSTER, overrides=FIELDS, overlap=True).overlap
    assert found is not None
    plan = found.choice.plan
    assert plan.overlap is not None
    sizes = {"dense_bytes": sum(plan.overlap.dense_bytes), "expert_bytes": sum(plan.overlap.expert_bytes)}
    workload = plan_model("tiny", CLUSTER, overrides=FIELDS).workload
    costs = overlap_costs(workload, CLUSTER, plan.layout, **sizes)
    assert simulate_block(plan.overlap, costs).makespan_s == pytest.approx(plan.foreseen_s, rel=1e-12)
