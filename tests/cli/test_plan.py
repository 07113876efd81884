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
