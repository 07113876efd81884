"""The command line on a real, very small run: every command, and what a user gets wrong, without a traceback."""

import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import small_run

from turnout import recipes
from turnout.cli.main import COMMANDS, main
from turnout.models import LM, LMConfig, checkpoint
from turnout.run.compiled import compiled_here

SMALL = [*small_run.SMALL, "steps=4"]


@pytest.fixture(scope="module")
def run(text, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "x"
    code = main(["train", "tiny", *SMALL, "--data", f"numbers={text}", "--out", str(out), "--quiet"])
    assert code == 0
    return out


def test_train_leaves_a_whole_folder(run):
    names = {path.name for path in run.iterdir()}
    assert {"run.json", "metrics.jsonl", "checkpoints", "model", "trace", "result.json", "report.html"} <= names
    result = json.loads((run / "result.json").read_text())
    assert 0 < result["bits_per_byte"] < 10
    assert set(result["by_domain"]) == {"numbers"}


def test_eval(run, capsys, tmp_path):
    assert main(["eval", str(run), "--json", "--trace", str(tmp_path / "trace")]) == 0
    report = json.loads(capsys.readouterr().out)
    result = json.loads((run / "result.json").read_text())
    assert report["values"]["bits_per_byte"] == pytest.approx(result["bits_per_byte"], rel=1e-6)
    assert (tmp_path / "trace" / "trace.json").exists()
    assert not (tmp_path / "trace" / "token_id.bin").exists(), "routes give the text away only when asked to"


def test_eval_on_other_text(run, text, capsys):
    assert main(["eval", str(run), "--data", f"a={text}", "--data", f"b={text / '3.txt'}", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    assert {"bits_per_byte/a", "bits_per_byte/b"} <= set(values)


def test_sample_is_repeatable(run, capsys):
    said = []
    for _ in range(2):
        assert main(["sample", str(run), "--prompt", "document", "--tokens", "8", "--seed", "5"]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert said[0].startswith("document")


def test_report_of_two_runs(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["report", str(run), str(run), "--out", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    assert "<svg" in page.read_text()


def test_report_of_conversions_and_of_a_run_beside_one(run, tmp_path):
    for name in ("one", "two"):
        assert (
            main(
                ["convert", str(run), "--drop-experts", "1", "--by", "random", "--out", str(tmp_path / name), "--quiet"]
            )
            == 0
        )
    page = tmp_path / "page.html"
    assert main(["report", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "Conversions side by side" in text and text.count("Before and after") == 2
    assert main(["report", str(run), str(tmp_path / "one"), "--out", str(page)]) == 0
    text = page.read_text()
    assert "beside it 1 model made of others" in text and "Before and after" in text and "Learning" in text


def test_runs_on_other_text_are_not_ranked(run, text, tmp_path, capsys):
    other = tmp_path / "text"
    shutil.copytree(text, other)
    (other / "more.txt").write_text("something else, " * 40)
    out, page = tmp_path / "y", tmp_path / "page.html"
    assert main(["train", "tiny", *SMALL, "held_out=0.4", "--data", str(other), "--out", str(out), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["report", str(run), str(out), "--out", str(page)]) == 0
    assert "Not ranked: " in page.read_text() and "less than" not in page.read_text()
    assert (
        json.loads((out / "run.json").read_text())["held_out_text"]
        != json.loads((run / "run.json").read_text())["held_out_text"]
    )


def test_a_run_repeats_from_its_run_json(run, tmp_path):
    again = tmp_path / "again"
    assert main(["run", str(run / "run.json"), "--out", str(again), "--quiet"]) == 0
    losses = [_losses(folder) for folder in (run, again)]
    assert losses[0] == losses[1]


def test_fields_may_stand_behind_the_options(tmp_path, text):
    out = tmp_path / "late"
    assert main(["train", "tiny", *SMALL, "--data", f"numbers={text}", "--out", str(out), "--quiet", "seed=9"]) == 0
    assert json.loads((out / "run.json").read_text())["train"]["seed"] == 9
    with pytest.raises(SystemExit):
        main(["train", "tiny", "--otu", "x"])


def test_resume_goes_on_from_the_last_checkpoint(run, tmp_path, text):
    out = tmp_path / "r"
    assert main(["train", "tiny", *SMALL, "steps=2", "--data", f"numbers={text}", "--out", str(out), "--quiet"]) == 0
    assert main(["train", "--resume", "--out", str(out), "steps=4", "--quiet"]) == 0
    assert [step for step, _ in _losses(out)] == [1, 2, 3, 4]


def _losses(folder: Path) -> list[tuple[int, float]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"]) for line in lines if line["kind"] == "train"]


def test_methods_lists_papers(capsys):
    assert main(["methods", "lossfree"]) == 0
    assert "Auxiliary-Loss-Free" in capsys.readouterr().out


def test_doctor_explains_its_choice(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said
    assert "cpu float32:" in said


def test_doctor_says_how_the_tokens_of_a_model_are_made(tmp_path, capsys, monkeypatch):
    checkpoint.save(tmp_path / "model", LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2, hidden=8)))
    assert main(["doctor", str(tmp_path / "model")]) == 0
    step = "one compiled step a token" if compiled_here() else "the model's modules, because"
    assert f"decodes on a CPU by {step}" in capsys.readouterr().out
    monkeypatch.setenv("TURNOUT_COMPILED", "0")
    assert main(["doctor", str(tmp_path / "model")]) == 0
    assert "the model's modules, because TURNOUT_COMPILED=0 is set" in capsys.readouterr().out


def test_lists(capsys):
    assert main(["train"]) == 0
    assert main(["verify"]) == 0
    said = capsys.readouterr().out
    assert "tiny_dense" in said
    assert "loss_free" in said


def test_verify_writes_what_it_saw(tmp_path, capsys):
    file = tmp_path / "c.json"
    assert main(["verify", "backends", "--quiet", "--seeds", "0,1,2", "--json", str(file)]) == 0
    (claim,) = json.loads(file.read_text())["claims"]
    assert claim["holds"] is True and claim["off"] == "two experts swapped"
    assert len(claim["evidence"][0]["measured"]) == 3


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train", "tyni", "--out", "x"], "Did you mean 'tiny'?"),
        (["train", "tiny", "widht=3", "--out", "x"], "Did you mean 'width'?"),
        (["train", "tiny"], "add --out"),
        (["train", "tiny", "--data", "no/such/folder", "--out", "x"], "no/such/folder"),
        (["train", "--resume", "--out", "nowhere"], "nowhere"),
        (["eval", "nowhere"], "nowhere"),
        (["sample", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["run", "nowhere/run.json", "--out", "x"], "nowhere"),
        (["verify", "los_free"], "Did you mean 'loss_free'?"),
        (["methods", "nothing-like-it"], "unknown method"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error


def test_a_folder_that_holds_another_run_is_refused(run, text, capsys):
    assert main(["train", "tiny", *SMALL, "--data", f"numbers={text}", "--out", str(run), "--quiet"]) == 2
    assert "another --out" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"\x00\x01binary\x00"])
def test_empty_or_binary_text_is_refused(content, tmp_path, capsys):
    (tmp_path / "odd.txt").write_bytes(content)
    code = main(["train", "tiny", *SMALL, "--data", str(tmp_path / "odd.txt"), "--out", str(tmp_path / "o"), "--quiet"])
    assert code == 2
    assert "odd.txt" in capsys.readouterr().err


def test_a_pipe_that_closes_early_is_not_an_error():
    command = f"{sys.executable} -m turnout methods | head -1"
    done = subprocess.run(command, check=False, shell=True, capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_examples(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"turnout {command}" in capsys.readouterr().out


def test_a_refused_run_leaves_the_one_that_is_there_untouched(run, text, tmp_path, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    (tmp_path / "other").mkdir()
    for n in range(40):
        (tmp_path / "other" / f"{n}.txt").write_text(f"other words {n} " * 30)
    argv = ["train", "tiny", *SMALL, "--data", str(tmp_path / "other"), "--out", str(run), "--quiet"]
    assert main(argv) == 2
    assert main([*argv, "--resume"]) == 2
    assert "data.domains must stay" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_goes_on_when_its_text_has_gone(text, tmp_path):
    source, out = tmp_path / "text", tmp_path / "out"
    shutil.copytree(text, source)
    assert main(["train", "tiny", *SMALL, "steps=2", "--data", str(source), "--out", str(out), "--quiet"]) == 0
    shutil.rmtree(source)
    assert main(["train", "--resume", "steps=4", "--out", str(out), "--quiet"]) == 0
    assert [step for step, _ in _losses(out)] == [1, 2, 3, 4]


def test_a_run_stopped_while_its_text_is_prepared_can_be_resumed(text, tmp_path, monkeypatch, capsys):
    from turnout.recipes import execute

    def stopped(*_, **__):
        raise KeyboardInterrupt

    out = tmp_path / "out"
    argv = ["train", "tiny", *SMALL, "--data", str(text), "--out", str(out), "--quiet"]
    with monkeypatch.context() as patch:
        patch.setattr(execute, "prepare", stopped)
        assert main(argv) == 130
    assert f"--resume --out {out}" in capsys.readouterr().err
    shutil.copytree(out, tmp_path / "again")
    assert main(["train", "--resume", "--out", str(out), "--quiet"]) == 0
    assert main([*argv[:-2], str(tmp_path / "again"), "--quiet"]) == 0, "the same command starts the same run"
    assert _losses(out) == _losses(tmp_path / "again")


def test_text_at_fault_leaves_the_folder_free(text, tmp_path):
    out = str(tmp_path / "out")
    assert main(["train", "tiny", *SMALL, "--data", str(tmp_path / "none"), "--out", out, "--quiet"]) == 2
    assert main(["train", "tiny", *SMALL, "--data", str(text), "--out", out, "--quiet"]) == 0


def test_eval_wants_the_text_the_run_was_trained_on(run, tmp_path, capsys):
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    body = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(body | {"tokens_folder": str(tmp_path / "gone")}))
    assert main(["eval", str(moved)]) == 0, "a folder that was moved brings its tokens"
    (moved / "run.json").write_text(json.dumps(body | {"tokens_digest": "0" * 64}))
    assert main(["eval", str(moved)]) == 2
    assert "--data" in capsys.readouterr().err


def test_a_run_repeats_from_another_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(text.parent)
    assert main(["train", "tiny", *SMALL, "--data", text.name, "--out", str(tmp_path / "a"), "--quiet"]) == 0
    monkeypatch.chdir(tmp_path)
    assert main(["run", "a", "--out", "b", "--quiet"]) == 0
    assert _losses(tmp_path / "a") == _losses(tmp_path / "b")


def test_show_lists_every_field_with_its_meaning(capsys):
    assert main(["train", "tiny", "width=96", "--show"]) == 0
    said = capsys.readouterr().out.splitlines()
    fields = [line for line in said if "=" in line]
    assert "model.width=96" in next(line for line in fields if "model.width" in line)
    assert len(fields) == len(recipes.tiny().fields())
    assert all(len(line.split(maxsplit=1)) == 2 for line in fields), "every field says what it means"


def test_a_router_that_sees_later_tokens_is_not_silent(text, tmp_path, capsys):
    argv = ["train", "tiny", *SMALL, "steps=1", "--data", str(text)]
    assert main([*argv, "router=ExpertChoice", "--out", str(tmp_path / "a")]) == 0
    assert "looking at later tokens" in capsys.readouterr().err
    assert main([*argv, "--out", str(tmp_path / "b")]) == 0
    assert "looking at later tokens" not in capsys.readouterr().err


def test_sample_says_as_much_as_fits_by_default(run, capsys):
    assert main(["sample", str(run)]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("theirs", ["config.json", "shard-1.safetensors", "model/notes.txt", "trace/0", "report.html"])
def test_a_run_does_not_begin_in_a_folder_of_somebody_elses(theirs, text, tmp_path, capsys):
    out = tmp_path / "llama"
    (out / theirs).parent.mkdir(parents=True)
    (out / theirs).write_text("theirs")
    assert main(["train", "tiny", "--data", str(text), "--out", str(out), "--quiet", *SMALL]) == 2
    assert f"{out}, which holds {Path(theirs).parts[0]}. Nearest fix: write to another" in capsys.readouterr().err
    assert [path.relative_to(out) for path in out.rglob("*") if path.is_file()] == [Path(theirs)]


def test_logs_and_prepared_tokens_are_nobody_elses(text, tmp_path):
    (tmp_path / "log.txt").write_text("")
    (tmp_path / "tokens").mkdir()
    assert main(["train", "tiny", "--data", str(text), "--out", str(tmp_path), "--quiet", *SMALL]) == 0


@pytest.mark.parametrize(
    ("kind", "words"),
    [("adaptation", r"adapters and a router without their model.*attach_folder"), ("conversion", "a converted model")],
)
@pytest.mark.parametrize("line", ["eval {}", "sample {} --prompt a", "certify {} {}", "train --resume --out {}"])
def test_a_folder_of_another_kind_is_called_what_it_is(kind, words, line, tmp_path, capsys):
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"format": f"turnout.{kind}/1"}))
    assert main([part.format(folder) for part in line.split()]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and "finish the run" not in error


def test_a_path_in_a_hint_is_quoted_for_the_shell(run, tmp_path, capsys):
    folder = tmp_path / "my run"
    folder.mkdir()
    shutil.copy(run / "run.json", folder)
    for line in (["sample"], ["eval"], ["convert", "--to", "moe", "--experts", "4", "--top-k", "2", "--dry-run"]):
        assert main([line[0], str(folder), *line[1:]]) == 2
        assert f"turnout train --resume --out '{folder}'" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("line", ["methods", "methods LossFree", "train tiny --show"])
def test_output_that_cannot_be_written_is_one_line_and_exit_2(line):
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "turnout", *line.split()]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2 and "could not be written" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(("command", "code"), [("certify", 141), ("verify", 141), ("methods", 0)])
def test_a_verdict_that_nobody_could_read_is_not_a_yes(command, code, monkeypatch):
    def gone(_):
        raise BrokenPipeError

    monkeypatch.setattr(importlib.import_module(f"turnout.cli.{command}"), "run", gone)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert main([command, *(["a", "b"] if command == "certify" else [])]) == code
