"""Run folders as plain data: whole ones, running ones, broken ones."""

import json

import pytest
import torch

from turnout.errors import CheckpointError, ShapeError
from turnout.measure import Passage, RunData, read_run
from turnout.types import Routing, TraceWriter


def write(folder, metrics: str = "", **files: object):
    folder.mkdir(parents=True, exist_ok=True)
    run = {"recipe": "tiny", "model": {"width": 8}, "hardware": {"cpu": "x"}, "command": "turnout train tiny"}
    (folder / "run.json").write_text(json.dumps(run))
    if metrics:
        (folder / "metrics.jsonl").write_text(metrics)
    for name, body in files.items():
        (folder / f"{name}.json").write_text(json.dumps(body))
    return folder


def line(kind: str, step: int, **rest: object) -> str:
    return json.dumps({"kind": kind, "step": step, "tokens": 10 * step, **rest}) + "\n"


def test_a_whole_folder(tmp_path) -> None:
    metrics = "".join(line("train", n, loss=5.0 - n, tokens_per_s=100.0 * n) for n in (1, 2, 3, 4))
    metrics += line("eval", 4, bits_per_byte=2.5, load=[[0.5, 0.5]], max_vio=0.0)
    passage = Passage.from_routings(["a"], [Routing.from_topk(torch.tensor([[1]]), torch.ones(1, 1), num_experts=2)])
    result = {
        "bits_per_byte": 2.25,
        "by_domain": {"code": 2.0},
        "load": [[0.25, 0.75]],
        "load_by_domain": {"code": [[0.25, 0.75]]},
        "cost": {"params": 100, "params_active": 60, "flops": 120.0},
        "passage": passage.to_json_dict(),
    }
    run = read_run(write(tmp_path / "moe", metrics, result=result))
    assert (run.name, run.bits_per_byte, run.by_domain) == ("moe", 2.25, {"code": 2.0})
    assert (run.step, run.tokens, run.num_experts) == (4, 40, 2)
    assert run.tokens_per_s == 300.0
    assert (run.cost.params, run.cost.params_active, run.cost.flops) == (100, 60, 120.0)
    assert run.config == {"recipe": "tiny", "model": {"width": 8}}
    assert (run.command, run.hardware) == ("turnout train tiny", {"cpu": "x"})
    assert run.passages == (passage,)
    assert run.notes == ()


def test_arrays_are_read_beside_the_result_and_what_a_run_took_from_either(tmp_path) -> None:
    """An older run has its arrays in result.json, as above."""
    passages = [
        Passage.from_routings(
            ["a"], [Routing.from_topk(torch.tensor([[1]]), torch.ones(1, 1), num_experts=2)], domain=d
        )
        for d in ("code", "prose")
    ]
    routes = {"load": [[0.25, 0.75]], "load_by_domain": {"code": [[0.25, 0.75]], "prose": [[0.5, 0.5]]}}
    routes["passages"] = [passage.to_json_dict() for passage in passages]
    metrics = line("eval", 4, bits_per_byte=2.5, load=[[0.5, 0.5]], seconds=8.0, peak_memory_bytes=100)
    folder = write(tmp_path, metrics, result={"bits_per_byte": 2.25, "seconds": 9.5}, routes=routes)
    run = read_run(folder)
    assert run.passages == tuple(passages)
    assert (run.load, run.load_by_domain) == (routes["load"], routes["load_by_domain"])
    assert (run.seconds, run.peak_memory_bytes, run.notes) == (9.5, 100, ())
    (folder / "routes.json").write_text('{"load": [[7]]}')
    broken = read_run(folder)
    assert broken.load == [[0.5, 0.5]] and broken.passages == ()
    assert any("routes.json cannot be read" in note for note in broken.notes)


def test_a_run_still_going_on_counts_its_last_evaluation_and_ignores_half_a_line(tmp_path) -> None:
    metrics = line("train", 1, loss=4.0) + line("eval", 1, bits_per_byte=3.0) + line("train", 2, loss=3.5)[:-9]
    run = read_run(write(tmp_path, metrics), name="now")
    assert (run.bits_per_byte, run.step, len(run.metrics)) == (3.0, 1, 2)


def test_lines_that_a_resumed_run_wrote_again_replace_the_first(tmp_path) -> None:
    metrics = line("train", 1, loss=4.0) + line("train", 2, loss=9.0) + line("train", 2, loss=3.0) + "[1]\n\n{}\n"
    assert [one["loss"] for one in read_run(write(tmp_path, metrics)).lines("train")] == [4.0, 3.0]


def test_loads_come_from_the_trace_when_the_result_has_none(tmp_path) -> None:
    folder = write(tmp_path, line("eval", 1, bits_per_byte=2.0, load=[[0.5, 0.5]]))
    with TraceWriter(folder / "trace", num_experts_L=[2], domains=["code", "prose"]) as writer:
        routing = Routing.from_topk(torch.tensor([[0], [0], [0], [1]]), torch.ones(4, 1), num_experts=2)
        writer.add([routing], document_tokens=[3, 1], document_domains=[0, 1])
    run = read_run(folder)
    assert run.load == [[0.75, 0.25]]
    assert run.load_by_domain == {"code": [[1.0, 0.0]], "prose": [[0.0, 1.0]]}


def test_broken_parts_are_notes_and_do_not_stop_the_reading(tmp_path) -> None:
    folder = write(
        tmp_path, line("eval", 1, bits_per_byte=2.0, load=[[0.5, 0.5]]), result={"passage": {"tokens": ["a"]}}
    )
    (folder / "trace").mkdir()
    (folder / "trace" / "trace.json").write_text("{}")
    run = read_run(folder)
    assert len(run.notes) == 2
    assert run.passages == ()
    (folder / "result.json").write_text("{")
    assert any("result.json" in note for note in read_run(folder).notes)


@pytest.mark.parametrize("text", [None, "{", "[]"])
def test_a_folder_without_a_run_is_an_error(tmp_path, text) -> None:
    if text is not None:
        (tmp_path / "run.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"run\.json"):
        read_run(tmp_path)


def test_the_passage_keeps_every_entry_the_heaviest_first_and_survives_json() -> None:
    score_TE = torch.tensor([[0.1, 0.2, 0.7], [0.5, 0.3, 0.2]])
    routing = Routing.from_entries(
        torch.tensor([0, 0]),
        torch.tensor([1, 2]),
        torch.tensor([0.25, 0.75]),
        num_tokens=2,
        num_experts=3,
        score_TE=score_TE,
    )
    passage = Passage.from_routings(["a", "b"], [routing], domain="code")
    assert passage.routes == ((((2, 0.75, 0.7), (1, 0.25, 0.2)), ()),)
    assert (passage.num_experts, passage.layers) == (3, ("0",))
    assert Passage.from_json_dict(json.loads(json.dumps(passage.to_json_dict()))) == passage


def test_a_passage_that_does_not_fit_its_routings_is_refused() -> None:
    routing = Routing.from_topk(torch.tensor([[1]]), torch.ones(1, 1), num_experts=2)
    with pytest.raises(ShapeError, match="every token"):
        Passage.from_routings(["a", "b"], [routing])
    with pytest.raises(CheckpointError, match="passage"):
        Passage.from_json_dict(
            {"tokens": ["a"], "routes": [[]], "layers": ["0"], "num_experts": 2, "domain": "", "source": ""}
        )
    with pytest.raises(CheckpointError, match="1 layers of routes and 0 names"):
        Passage.from_json_dict(
            {"tokens": ["a"], "routes": [[[]]], "layers": [], "num_experts": 2, "domain": "", "source": ""}
        )


def test_a_run_without_anything_answers_none() -> None:
    run = RunData("x")
    assert (run.bits_per_byte, run.tokens, run.step, run.num_experts, run.by_domain) == (None, None, None, 0, {})
