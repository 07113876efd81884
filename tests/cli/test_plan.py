"""``turnout plan`` and ``turnout parity``: options that do not go together, and more processes than a machine bears."""

import json
from pathlib import Path
from typing import Any

import pytest

from turnout.cli.main import main
from turnout.recipes import cluster, parity, spawned
from turnout.types import Cluster

TINY = ["tiny", "width=16", "layers=2", "heads=2", "kv_heads=1", "vocab_size=300", "seq=16", "max_seq=16", "batch=8"]


def not_started(*given: Any) -> None:
    raise AssertionError("processes were started")


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawned, "_cores", lambda: 2)
    monkeypatch.setattr(spawned, "free_memory", lambda: 20 * 10**9)
    for module in (cluster, parity):
        monkeypatch.setattr(module, "spawned", not_started)


@pytest.mark.usefixtures("two_cores")
def test_more_processes_than_the_machine_bears_are_refused_before_any_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "dp_shard=64"]) == 2
    said = capsys.readouterr().err
    assert "PLAN must be for 16 processes at most, which 2 cores bear, in turnout parity; got 64 processes" in said
    assert "torchrun --nproc-per-node 64 -m turnout parity" in said
    assert main(["plan", *TINY, "--here", "17"]) == 2
    assert "--here must be for 16 processes at most" in capsys.readouterr().err
    monkeypatch.setattr(spawned, "free_memory", lambda: 10**9)
    assert main(["parity", "dp_shard=4"]) == 2
    said = capsys.readouterr().err
    assert "PLAN must be for 3 processes at most, which 1.00 GB of free memory bear" in said


@pytest.mark.parametrize(
    "given", [["--html", "p.html"], ["--devices", "2"], ["--top", "3"], ["--foreign"], ["--overlap"]]
)
def test_what_measuring_has_no_use_for_is_refused(
    given: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cluster, "spawned", not_started)
    assert main(["plan", *TINY, "--here", "2", *given]) == 2
    said = capsys.readouterr()
    assert f"--here must stand without {given[0]}" in said.err and f"got {given[0]} beside it" in said.err
    assert not said.out


def test_the_measured_cluster_is_printed_as_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = Cluster(devices_per_node=2, memory_bytes=1e9, name="this one")
    monkeypatch.setattr(cluster, "measured_cluster", lambda *given: found)
    out = tmp_path / "c.toml"
    assert main(["plan", *TINY, "--here", "2", "--json", "--out", str(out)]) == 0
    assert Cluster(**json.loads(capsys.readouterr().out)) == found == Cluster.open(out)


def test_a_plan_that_cannot_be_written_is_said_before_all_else(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import dataclasses

    from turnout.recipes import layouts

    true = layouts.plan_model

    def foreseen(*given: Any, **how: Any) -> layouts.Planned:
        found = true(*given, **how)
        return dataclasses.replace(
            found, choices=tuple(dataclasses.replace(c, plan=other(c.plan)) for c in found.choices)
        )

    def other(plan: Any) -> Any:
        return dataclasses.replace(plan, layout=dataclasses.replace(plan.layout, tp=2))

    monkeypatch.setattr(layouts, "plan_model", foreseen)
    out, page = tmp_path / "p.json", tmp_path / "p.html"
    assert main(["plan", *TINY, "--foreign", "--out", str(out), "--html", str(page)]) == 2
    said = capsys.readouterr()
    assert "leave --foreign out, or raise --top" in said.err and not said.out
    assert not out.exists() and not page.exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["dp_shard=2", "--dtype", "bf16"], "unknown dtype 'bf16'"),
        (["dp_shard=2", "--plant", "facto"], "Did you mean 'factor'?"),
        (["dp_shard=2", "--rows", "-1"], "--rows must be 0 or more"),
        (["dp_shard=2,ep=2,ep=1"], "ep must be given once"),
    ],
)
def test_what_parity_cannot_do_is_said_before_processes_start(
    given: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity, "spawned", not_started)
    assert main(["parity", *given]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("more", [[], ["--here", "2"]])
def test_a_file_that_cannot_be_written_is_said_before_the_work(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(cluster, "spawned", not_started)
    (tmp_path / "file").write_text("x")
    for path, why in ((tmp_path, "which is a folder"), (tmp_path / "file" / "x" / "y", "is a file")):
        assert main(["plan", *TINY, *more, "--out", str(path)]) == 2
        said = capsys.readouterr()
        assert "--out must be a file of its own" in said.err and why in said.err and not said.out
    assert main(["plan", *TINY, "--out", "same", "--html", "same"]) == 2
    assert "--html must be a file of its own in turnout plan; got same, which --out is too" in capsys.readouterr().err


def test_a_model_of_short_texts_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its config alone: fewer positions than the recipe has whose training it is given."""
    from turnout.models import LM, LMConfig, checkpoint

    checkpoint.save(tmp_path / "m", LM(LMConfig(vocab_size=64, width=16, layers=1, heads=2, max_seq=32)))
    assert main(["plan", str(tmp_path / "m"), "batch=4"]) == 0
    assert "sequences of 32 tokens" in capsys.readouterr().out


def test_an_empty_layout_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["train", "tiny", "--layout", "", "--out", str(tmp_path / "x")]) == 2
    assert "--layout must " in capsys.readouterr().err and not (tmp_path / "x").exists()
