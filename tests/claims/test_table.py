"""The table of claims: kept claim by claim, taken up again where it was left, never from other seeds or other code."""

import json

import pytest

from turnout.claims import table
from turnout.claims.backends import backends
from turnout.claims.table import Table, measured
from turnout.cli.main import main
from turnout.errors import UsageError

SEEDS = (0, 1, 2)


def seen(claims, **options):
    return list(measured(claims, seeds=SEEDS, **options))


def test_results_come_in_order_with_the_time_left():
    told = []
    first, second = seen([backends(), backends()], note=told.append)
    assert first.values == second.values and first.seeds == SEEDS
    assert len(told) == 6 and all("min left" in line for line in told)


@pytest.mark.slow
def test_several_processes_give_the_same_numbers():
    (alone,), (together,) = seen([backends()]), seen([backends()], jobs=2)
    assert alone.values == together.values


def test_finished_claims_are_kept_and_not_run_again(tmp_path, monkeypatch, capsys):
    path = tmp_path / "table.json"
    command = ["verify", "backends", "--seeds", "0,1,2", "--json", str(path), "--quiet"]
    assert main(command) == 0
    before = path.read_bytes()
    monkeypatch.setattr(table, "_timed", lambda name, seed: pytest.fail("it was measured again"))
    assert main([*command, "--resume"]) == 0
    assert path.read_bytes() == before
    assert "1 of 1 claims hold" in capsys.readouterr().out


def test_what_other_seeds_or_other_code_measured_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    (result,) = seen([backends()])
    Table(path, seeds=SEEDS, resume=False).add(result, ["backends"])
    assert list(Table(path, seeds=SEEDS, resume=True).claims) == ["backends"]
    assert Table(path, seeds=SEEDS, resume=False).claims == {}
    with pytest.raises(UsageError, match="differs in seeds"):
        Table(path, seeds=(0, 1), resume=True)
    monkeypatch.setattr(table, "code", lambda: "another")
    with pytest.raises(UsageError, match="differs in code"):
        Table(path, seeds=SEEDS, resume=True)
    path.write_text("[]")
    with pytest.raises(UsageError):
        Table(path, seeds=SEEDS, resume=True)


def test_the_file_says_what_it_was_measured_with(tmp_path):
    path = tmp_path / "table.json"
    (result,) = seen([backends()])
    Table(path, seeds=SEEDS, resume=False).add(result, ["backends"])
    told = json.loads(path.read_text())
    assert told["seeds"] == list(SEEDS) and len(told["code"]) == 16 and told["torch"]
    assert told["claims"][0]["values"] == {name: list(result.all(name)) for name in result.values[0]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--seeds", "0,0"], "--seeds"), (["--seeds", "a"], "--seeds"), (["--seeds", ""], "--seeds"),
     (["--seeds", "0,-1"], "--seeds"), (["--jobs", "0"], "--jobs"), (["--resume"], "--json")],
)  # fmt: skip
def test_what_cannot_be_run_is_refused(arguments, said, capsys):
    assert main(["verify", "backends", *arguments]) == 2
    assert said in capsys.readouterr().err
