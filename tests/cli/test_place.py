"""``turnout place`` and ``turnout certify`` on its file: what they write, check, and what a user gets wrong."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from turnout.cli import place
from turnout.cli.main import main
from turnout.measure import placement_report
from turnout.recipes.place import WAYS
from turnout.storage import sealed
from turnout.types import Placement, Routing, Trace, TraceWriter, Traffic


def record(path: Path, seed: int, *, layers: int = 3, tokens: int = 600) -> str:
    """Tokens that walk over 4 experts a layer, one at a time."""
    rng = np.random.default_rng(seed)
    rows, chosen = np.random.default_rng(0).dirichlet(np.full(4, 0.3), (layers, 4)), [rng.integers(0, 4, tokens)]
    for layer in range(layers - 1):
        chosen.append(np.array([rng.choice(4, p=rows[layer, e]) for e in chosen[-1]]))
    with TraceWriter(path, num_experts_L=[4] * layers, domains=["all"]) as writer:
        entries = [Routing.from_topk(torch.tensor(e)[:, None], torch.ones(tokens, 1), num_experts=4) for e in chosen]
        writer.add(entries, document_tokens=[tokens], document_domains=[0])
    return str(path)


@pytest.fixture(scope="module")
def traces(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A trace, and a later one of the same model."""
    root = tmp_path_factory.mktemp("traces")
    return record(root / "trace", 0), record(root / "later", 1)


def test_the_parser_knows_every_way():
    assert place.WAYS == WAYS


@pytest.mark.parametrize("by", WAYS)
def test_every_way_is_written_and_holds(by, traces, tmp_path, capsys):
    out = str(tmp_path / "p.json")
    assert main(["place", traces[0], "--devices", "2", "--by", by, "--out", out]) == 0
    assert "busiest device over the mean" in capsys.readouterr().out
    assert main(["certify", out, traces[0]]) == 0
    assert "the placement holds" in capsys.readouterr().out
    assert main(["certify", out, traces[1]]) == 1
    assert "it was made from another trace" in capsys.readouterr().out


@pytest.mark.parametrize("by", ["load", "affinity", "both"])
def test_re_planning_keeps_its_budget_and_is_checked_against_what_was_before(by, traces, tmp_path, capsys):
    old, new = str(tmp_path / "old.json"), str(tmp_path / "new.json")
    assert main(["place", traces[0], "--devices", "2", "--by", "contiguous", "--out", old]) == 0
    wanted = ["place", traces[1], "--devices", "2", "--by", by, "--from", old, "--moves", "0.34", "--out", new]
    assert main([*wanted, "--expert-bytes", "10", "--json"]) == 0
    moves = Placement.open(old).moved(Placement.open(new), expert_bytes=10)
    stated = Placement.read(new)[1]["values"]
    assert 0 < len(moves.copies) == stated["moves"] <= 4 and stated["moved_bytes"] == moves.bytes
    assert main(["certify", new, traces[1], "--from", old]) == 0
    capsys.readouterr()
    assert main(["certify", new, traces[1]]) == 2
    assert "--from" in capsys.readouterr().err
    traffic = Traffic.of(Trace.open(traces[1]))
    what = traffic.imbalance if by == "load" else traffic.crossing
    assert by == "both" or what(Placement.open(new)) < what(Placement.open(old))


@pytest.mark.parametrize("name", ["imbalance", "crossing", "crossing_bound", "imbalance_bound", "slots"])
def test_a_number_that_is_not_so_is_found_though_the_seal_is_right(name, traces, tmp_path, capsys):
    out = tmp_path / "p.json"
    assert main(["place", traces[0], "--devices", "2", "--out", str(out)]) == 0
    body = json.loads(out.read_text())
    body.pop("sha256")
    body["stated"]["values"][name] = body["stated"]["values"][name] + 1
    out.write_text(json.dumps(sealed(body)))
    capsys.readouterr()
    assert main(["certify", str(out), traces[0]]) == 1
    assert f"it says {name} is" in capsys.readouterr().out


def test_an_altered_file_is_refused(traces, tmp_path, capsys):
    out = tmp_path / "p.json"
    assert main(["place", traces[0], "--devices", "2", "--out", str(out)]) == 0
    out.write_text(out.read_text().replace('"nodes": 1', '"nodes": 2', 1))
    assert main(["certify", str(out), traces[0]]) == 2
    assert "sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--devices", "3", "--nodes", "2"], "--nodes"),
        (["--devices", "5"], "devices"),
        (["--devices", "2", "--slots", "3"], "slots"),
        (["--devices", "2", "--slots", "6", "--by", "exflow"], "leave --slots out"),
        (["--devices", "2", "--moves", "0.1"], "add --from FILE"),
        (["--devices", "2", "--speeds", "1,x"], "--speeds 1,1,0.5,1"),
        (["--devices", "2", "--speeds", "1"], "2 positive numbers"),
        (["--devices", "2", "--speeds", "1,2", "--by", "exflow"], "--by both or --by load"),
        (["--devices", "2", "--from", "none.json"], "exist"),
        (["--devices", "0"], "devices"),
        (["--devices", "2", "--balance", "0.5"], "balance"),
        (["--devices", "2", "--balance", "1.1", "--by", "load"], "leave --balance out, or use --by both"),
        (["--devices", "2", "--expert-bytes", "5"], "add --from FILE"),
        (["--devices", "2", "--speeds", ""], "--speeds 1,1,0.5,1"),
    ],
)
def test_what_cannot_be_placed_is_one_line(words, says, traces, capsys):
    assert main(["place", traces[0], *words]) == 2
    error = capsys.readouterr().err
    assert says in error and "Nearest fix" in error and error.count("\n") == 1


def test_the_bounds_are_of_the_slots_that_there_are_not_of_those_that_were_used(traces, tmp_path, capsys):
    """Room that helps nobody stays empty; what a placement in all of it could reach is the bound all the same."""
    traffic = Traffic.of(Trace.open(traces[0]))
    plain = Placement.contiguous(traffic.num_experts_L, devices=2)
    tight, roomy = placement_report(traffic, plain), placement_report(traffic, plain, slots=8)
    assert roomy["slots"] == tight["slots"] == 12
    assert roomy["imbalance_bound"] <= tight["imbalance_bound"]
    assert roomy["crossing_bound"] == 0 < tight["crossing_bound"]  # every expert on both devices
    out = str(tmp_path / "p.json")
    for slots in ("5", "6", "8"):
        words = ["place", traces[0], "--devices", "2", "--slots", slots, "--balance", "4", "--out", out, "--json"]
        assert main(words) == 0
        found = json.loads(capsys.readouterr().out)["values"]
        bound = placement_report(traffic, Placement.open(out), slots=int(slots))
        assert found["crossing_bound"] == bound["crossing_bound"], slots
        assert found["imbalance_bound"] == bound["imbalance_bound"], slots
        assert main(["certify", out, traces[0]]) == 0
        capsys.readouterr()
    assert place.table(roomy, 24).startswith("12 experts in 12 of 24 slots on 2 devices in 1 node\n")
    assert place.table(tight).startswith("12 experts in 12 slots on 2 devices in 1 node\n")


@pytest.mark.parametrize("size", ["-3", "nan", "inf"])
def test_bytes_that_no_copy_has_are_refused(size, traces, tmp_path, capsys):
    out = str(tmp_path / "p.json")
    assert main(["place", traces[0], "--devices", "2", "--out", out]) == 0
    assert main(["place", traces[0], "--devices", "2", "--from", out, "--expert-bytes", size]) == 2
    assert "--expert-bytes must be a number of at least 0" in capsys.readouterr().err


def test_a_trace_of_one_layer_has_load_alone(tmp_path, capsys):
    trace = record(tmp_path / "one", 0, layers=1)
    assert main(["place", trace, "--devices", "2"]) == 2
    assert "use --by load" in capsys.readouterr().err
    assert main(["place", trace, "--devices", "2", "--by", "load"]) == 0


def test_from_and_models_do_not_go_together(traces, tmp_path, capsys):
    assert main(["certify", traces[0], traces[1], "--from", "x"]) == 2
    assert "leave --from out" in capsys.readouterr().err
    out = str(tmp_path / "p.json")
    assert main(["place", traces[0], "--devices", "2", "--out", out]) == 0
    assert main(["certify", out, traces[0], "--bound", "1"]) == 2
    assert "leave --bound out" in capsys.readouterr().err
