"""A run on many processes: what stops one rank is told by all, and a run that was killed goes on by itself."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
from processes import ROOT, outcomes

from benchmarks.restarts import restarts
from turnout.cli.main import main
from turnout.decide.device import named_schedule
from turnout.errors import UsageError
from turnout.recipes import agreed, tiny
from turnout.recipes import spread as spreading
from turnout.recipes.parity import plan_of
from turnout.recipes.run import Run
from turnout.recipes.spread import spread
from turnout.train import sharded, sides
from turnout.types.layout import Layout
from turnout.types.plan import Plan

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
# On two cores that others share, ranks come to the same place seconds apart.
_WAIT_S = 15.0


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
    if what.endswith("in a pipeline"):
        what, plan = what.partition(" ")[0], plan_of("pp=2,dp_shard=2,microbatches=2")
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
    spread(run, out, plan=plan, timeout_s=_WAIT_S, quiet=True)


def _altered(lm: Any) -> Any:
    lm.embedding.data[3, 1] += 1e-6
    return lm


def _at_step_3(action: Any) -> None:
    for kind, name in ((sharded.Sharded, "wholes"), (sides.Sides, "begin")):
        _on_the_fourth(kind, name, action)


def _on_the_fourth(kind: type, name: str, action: Any) -> None:
    """Three steps are done then."""
    true, count = getattr(kind, name), [0]

    def counted(*given: Any) -> Any:
        count[0] += 1
        if count[0] == 4:
            action()
        return true(*given)

    setattr(kind, name, counted)


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
        (
            "seed",
            "train.lr must be the same on every rank in turnout.run.ranks; got 0.001 on rank 2; 0.004 on",
        ),
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
@pytest.mark.parametrize("what", ["hung", "dead", "failed", "hung in a pipeline"])
def test_a_rank_that_is_gone_is_named_and_what_was_saved_stays(what: str, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    found = outcomes(4, planted, what, text, out, group=False, patience_s=15)
    gone = {
        "failed": "rank 2 stopped with UsageError: this text was not expected",
        "hung": "rank 2 did not answer after 15 s: alive, and elsewhere",
        "dead": "rank 2 did not answer: dead, or stopped",
    }[what.partition(" ")[0]]
    for rank in (0, 1, 3):
        assert f"in step 4 of 4: {gone}. " in found[rank].error, found[rank]
        assert "Stopped at step 3 of 4; step-00000002 is saved; to go on from it" in found[rank].error
        assert found[rank].exit_code == 1
    from turnout.train.state import damage, find

    assert [path.name for path in find(out / "checkpoints")] == ["step-00000002"]
    assert damage(out / "checkpoints/step-00000002") is None


@pytest.mark.slow
def test_a_killed_rank_is_brought_back_by_torchrun(tmp_path: Path) -> None:
    found = restarts(tmp_path / "runs", ROOT / "turnout" / "claims", kills=1, ranks=2, layout="dp_shard=2")
    log = (tmp_path / "runs/killed.log").read_text()
    assert (found["recovered"], found["exit_code"], found["losses_equal"]) == (1, 0, True), f"{found}\n{log}"


# ---- the command line, and what it trains


def by_command(rank: int, given: list[str]) -> int:
    """As torchrun starts it."""
    return main(["train", "tiny", *given, "--timeout", "60"])


def _two_machines(rank: int) -> dict[str, str]:
    return {"LOCAL_WORLD_SIZE": "2"}  # as far as it knows


def trained(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_pipeline_and_zero_plus_plus_train_as_one_process(text: Path, tmp_path: Path) -> None:
    """Under a plan from a file: a schedule in full through a pipeline; int8 and int4, in two hops, on four ranks."""
    schedule = named_schedule("ZBVZeroBubble", 2, 2)
    plans = {
        "piped": Plan(Layout(pp=2, dp_shard=2), microbatches=2, actions=schedule, stages=(1, 1, 1, 1)),
        "rounded": Plan(Layout(dp_shard=4), gather="int8", reduce="int4"),
    }
    fields = [*FIELDS, "layers=4", "batch=8"]
    one = ["--data", f"text={text}", "--quiet", "--tokens", str(tmp_path / "tokens")]
    assert main(["train", "tiny", *fields, *one, "--out", str(tmp_path / "one")]) == 0
    for name, plan in plans.items():
        plan.save(tmp_path / f"{name}.json")
        given = [*fields, *one, "--plan", str(tmp_path / f"{name}.json"), "--out", str(tmp_path / name)]
        found = outcomes(4, by_command, given, group=False, environment=_two_machines)
        assert [outcome.error for outcome in found] == [""] * 4, found
        assert [outcome.value for outcome in found] == [0] * 4
    want, piped, rounded = (trained(tmp_path / name) for name in ("one", *plans))
    assert len(want) == len(piped) == len(rounded) > 4
    for ours, coarse, theirs in zip(piped, rounded, want, strict=True):
        for what in ("loss", "grad_norm", "aux_loss", "z_loss", "max_vio", "bits_per_byte"):
            if theirs.get(what) is not None:
                assert ours[what] == pytest.approx(theirs[what], rel=1e-5, abs=1e-6), what
        for what in ("loss", "bits_per_byte"):
            assert coarse.get(what) == (None if what not in theirs else pytest.approx(theirs[what], rel=1e-2)), what
    assert [line.get("loss") for line in rounded] != [line.get("loss") for line in want], "nothing was rounded"
    results = [json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "piped")]
    assert results[1]["bits_per_byte"] == pytest.approx(results[0]["bits_per_byte"], rel=1e-5)
    assert (tmp_path / "piped/model/model.safetensors").is_file()


def test_a_layout_without_torchrun_prints_the_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "tiny", "--layout", "dp_shard=4,ep=2", "--out", str(tmp_path / "x")]) == 2
    said = capsys.readouterr().err
    assert "the layout must be run by as many as it takes in turnout train; got dp_shard=4 ep=2 zero=3, for 4" in said
    assert "Nearest fix: start it with: torchrun --nproc-per-node 4 -m turnout" in said
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
    assert main(["train", "tiny", "--timeout", "5", "--out", "x"]) == 2
    assert "--timeout must go with --layout or --plan" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("layout", "fields", "said"),
    [
        ("dp_shard=3", ["batch=4"], "batch must be a multiple of dp_replicate x dp_shard = 3"),
        ("pp=2,dp_shard=2,microbatches=3", ["batch=8"], "batch must be a multiple of dp_replicate x dp_shard x microb"),
        ("pp=2,schedule=1F1C", ["batch=8"], "1F1C"),
        ("pp=8", ["batch=16"], "stages must have a block each"),
        ("dp_shard=2", ["only=router"], "only must be all where many processes train"),
    ],
)
def test_what_is_not_trained_as_one_process_would_is_refused(
    layout: str, fields: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        spread(tiny().override(fields), tmp_path / "x", plan=plan_of(layout))
    assert not (tmp_path / "x").exists()
