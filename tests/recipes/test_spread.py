"""A run on many processes: what stops one rank is told by all, and a run that was killed goes on by itself."""

import os
import time
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, outcomes

from benchmarks.restarts import restarts
from turnout.cli.main import main
from turnout.errors import UsageError
from turnout.recipes import agreed, tiny
from turnout.recipes import spread as spreading
from turnout.recipes.parity import plan_of
from turnout.recipes.run import Run
from turnout.recipes.spread import spread
from turnout.train import sharded

FIELDS = ["width=16", "layers=2", "heads=2", "kv_heads=1", "vocab_size=300", "seq=16", "max_seq=16", "batch=4"]
FIELDS += [
    "num_experts=4",
    "moe.hidden=8",
    "eval_tokens=64",
    "log_every=1",
    "checkpoint_every=2",
    "steps=4",
    "held_out=0.3",
]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number}.txt").write_text(f"Turnout number {number} sends a train down one of several tracks. " * 9)
    return folder


def small(text: Path, *fields: str) -> Run:
    return tiny().with_domains({"text": (str(text),)}).scaled([*FIELDS, *fields])


def planted(rank: int, what: str, text: Path, out: Path) -> None:
    """A run of which rank 2 has something else, or comes to an end."""
    run, plan = small(text), plan_of("dp_shard=4,ep=2")
    if rank == 2 and what == "code":
        agreed.code_digest = lambda: "f" * 64
    if rank == 2 and what == "plan":
        plan = plan_of("dp_shard=4,ep=4")
    if rank == 2 and what == "seed":
        run = small(text, "lr=0.001")
    if rank == 2 and what == "weights":
        true = spreading.begin
        spreading.begin = lambda *given, **how: _altered(true(*given, **how))
    if rank == 2 and what in ("hung", "dead", "failed"):
        _at_step_3(lambda: _end(what))
    spread(run, out, plan=plan, timeout_s=5, quiet=True)


def _altered(lm: Any) -> Any:
    lm.embedding.data[3, 1] += 1e-6
    return lm


def _at_step_3(action: Any) -> None:
    true, count = sharded.Sharded.wholes, [0]

    def wholes(self: Any, routings: Any) -> Any:
        count[0] += 1
        if count[0] == 4:  # three steps are done
            action()
        return true(self, routings)

    sharded.Sharded.wholes = wholes


def _end(what: str) -> None:
    if what == "failed":
        raise UsageError("this text was not expected")
    if what == "dead":
        os._exit(9)
    time.sleep(600)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("code", "turnout's code must be the same on every rank"),
        ("plan", "the plan must be the same on every rank"),
        ("seed", "train.lr must be the same on every rank in turnout.run.processes; got 0.001 on rank 2; 0.004 on"),
        ("weights", "the initial weights must be the same on every rank"),
    ],
)
def test_a_rank_with_something_else_stops_all_with_its_name(what: str, said: str, text: Path, tmp_path: Path) -> None:
    found = outcomes(4, planted, what, text, tmp_path / "out", group=False)
    assert len({outcome.error for outcome in found}) == 1, found
    assert found[0].error.startswith(f"UsageError: {said}"), found[0]
    assert " on rank 2; " in found[0].error
    assert " on ranks 0, 1 and 3." in found[0].error
    assert not (tmp_path / "out" / "checkpoints").exists()


@pytest.mark.slow
@pytest.mark.parametrize("what", ["hung", "dead", "failed"])
def test_a_rank_that_is_gone_is_named_and_what_was_saved_stays(what: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = outcomes(4, planted, what, text, out, group=False, patience_s=15)
    gone = {
        "failed": "rank 2 stopped with UsageError: this text was not expected",
        "hung": "rank 2 did not answer after 5 s: alive, and elsewhere",
        "dead": "rank 2 did not answer: dead, or stopped",
    }[what]
    for rank in (0, 1, 3):
        assert f"in step 4 of 4: {gone}. " in found[rank].error, found[rank]
        assert "Stopped at step 3 of 4; step-00000002 is saved; to go on from it" in found[rank].error
        assert found[rank].exit_code == 1
    from turnout.train.state import damage, find

    assert [path.name for path in find(out / "checkpoints")] == ["step-00000002"]
    assert damage(out / "checkpoints/step-00000002") is None


@pytest.mark.slow
def test_a_killed_rank_is_brought_back_by_torchrun(tmp_path: Path) -> None:
    found = restarts(tmp_path / "runs", ROOT / "benchmarks", kills=1, ranks=2, layout="dp_shard=2")
    log = (tmp_path / "runs/killed.log").read_text()
    assert (found["recovered"], found["exit_code"], found["losses_equal"]) == (1, 0, True), f"{found}\n{log}"


# ---- the command line


def test_a_layout_without_torchrun_prints_the_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "tiny", "--layout", "dp_shard=4,ep=2", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "the layout must be run by as many as it takes in turnout train; got dp_shard=4 ep=2 zero=3, for 4" in said
    assert "Nearest fix: start it with: torchrun --nproc-per-node 4 -m turnout " in said
    assert not (tmp_path / "x").exists()


def test_torchrun_without_a_layout_is_told_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert main(["train", "tiny", "--out", str(tmp_path / "x")]) == 2
    assert "--layout must say how the model is spread over them" in capsys.readouterr().err
    assert main(["train", "tiny", "--layout", "dp_shard=4", "--plan", "p.json", "--out", "x"]) == 2
    assert "--layout and --plan must be one" in capsys.readouterr().err
    assert main(["train", "tiny", "--layout", "dp_shards=4", "--out", "x"]) == 2
    assert "write dp_shard=4,ep=2" in capsys.readouterr().err
    assert main(["train", "tiny", "--layout", "dp_shard=4", "--timeout", "0", "--out", "x"]) == 2
    assert "--timeout must be above 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "fields", "said"),
    [
        ("dp_shard=3", ["batch=4"], "batch must be a multiple of dp_replicate x dp_shard = 3"),
        ("pp=2", [], "pp must be 1 in turnout train"),
        ("dp_shard=2", ["only=router"], "only must be all where many processes train"),
    ],
)
def test_what_is_not_trained_as_one_process_would_is_refused(
    layout: str, fields: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        spread(tiny().override(fields), tmp_path / "x", plan=plan_of(layout))
    assert not (tmp_path / "x").exists()
