"""``turnout convert`` on real, very small folders: what it says and writes, and what a user gets wrong."""

import json
from pathlib import Path

import pytest
import torch

from turnout.cli.convert import read_steps
from turnout.cli.main import main
from turnout.errors import UsageError
from turnout.models import LM, LMConfig, checkpoint
from turnout.recipes.steps import Drop, Merge, Split, Upcycle
from turnout.train.data import train_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory, text) -> Path:
    """A folder as transformers reads it; its tokenizer is learned from the text."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    config = LMConfig(vocab_size=300, width=16, layers=2, heads=2, hidden=24, max_seq=64, init_std=0.2)
    assert checkpoint.to_hf(LM(config).eval(), folder) == "LlamaForCausalLM"
    texts = [file.read_text() for file in sorted(text.iterdir())]
    train_tokenizer(texts, vocab_size=300).save(str(folder / "tokenizer.json"))
    return folder


def test_a_chain_on_the_command_line(llama, text, tmp_path, capsys):
    out = tmp_path / "out"
    steps = "--to moe --experts 8 --top-k 2 --drop-experts 25% --by frequency".split()
    assert main(["convert", str(llama), *steps, "--calibration", str(text), "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert f"{out}: MixtralForCausalLM" in said.out and "input against output" in said.out
    assert "step 2 of 2: drop_experts" in said.err and "8 experts, hidden 24, top 2" in said.err
    lm, dense = checkpoint.from_hf(out), checkpoint.from_hf(llama)
    assert lm.config.moe.num_experts == 6
    id_BS = torch.arange(60).view(2, 30)
    torch.testing.assert_close(lm(id_BS).logits_BSV, dense(id_BS).logits_BSV, rtol=0, atol=1e-5)
    body = json.loads((out / "run.json").read_text())["conversion"]
    assert [(step["step"], step["report"]["title"]) for step in body["steps"]] == [
        ("upcycle", "upcycle"),
        ("drop_experts", "drop_experts"),
    ]
    assert body["hardware"]["torch"] == torch.__version__
    assert json.loads((out / "certificate.json").read_text())["b"]["name"] == str(out)


def test_the_page_shows_before_and_after(llama, text, tmp_path, capsys):
    out = tmp_path / "out"
    steps = "--split 8 --top-k 4 --drop-experts 2".split()
    assert main(["convert", str(llama), *steps, "--calibration", str(text), "--out", str(out), "--quiet"]) == 0
    page = (out / "report.html").read_text()
    held_out = json.loads((out / "run.json").read_text())["conversion"]["held_out"]
    for when in ("before", "after"):
        assert f"{held_out[when]['bits_per_byte']:.4f}" in page
    assert "<td>experts a layer</td><td>–</td><td>8</td><td>6</td>" in page
    again = tmp_path / "again.html"
    assert main(["report", str(out), "--out", str(again)]) == 0
    assert again.read_text() == page
    capsys.readouterr()


def test_a_dry_run_writes_nothing(llama, tmp_path, capsys):
    argv = ["convert", str(llama), *"--to moe --experts 8 --top-k 2".split(), "--out", str(tmp_path / "out")]
    assert main([*argv, "--dry-run"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert lines[0].split() == ["parameters", "active", "memory", "FLOPs/token"]
    assert lines[1].startswith("input") and lines[2].startswith("1 upcycle")
    assert "writes MixtralForCausalLM" in said
    assert not list(tmp_path.iterdir())


def test_a_run_stays_a_run(run, text, tmp_path, capsys):
    out = tmp_path / "smaller"
    steps = ["--drop-experts", "1", "--calibration", str(text)]
    assert main(["convert", str(run), *steps, "--out", str(out), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    assert main(["eval", str(out), "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["values"]["bits_per_byte"] < 12
    assert main(["sample", str(out), "--tokens", "3"]) == 0
    capsys.readouterr()
    body = json.loads((out / "run.json").read_text())
    assert body["model"]["moe"]["num_experts"] == 3
    again = tmp_path / "again"
    assert main(["run", str(out / "run.json"), "--out", str(again), "--quiet"]) == 0
    weights = "model/model.safetensors"
    assert (out / weights).read_bytes() == (again / weights).read_bytes()
    assert main(["run", str(out), "--out", str(tmp_path / "third"), "steps=3"]) == 2
    assert "stay out" in capsys.readouterr().err


def test_a_run_is_merged_and_exported(run, text, tmp_path, capsys):
    merged = tmp_path / "merged"
    steps = ["--merge-experts", "2", "--calibration", str(text)]
    assert main(["convert", str(run), *steps, "--out", str(merged), "--quiet"]) == 0
    assert sum(checkpoint.load(merged / "model").config.moe.distinct) == 4
    assert main(["convert", str(run), "--as", "model", "--out", str(tmp_path / "own"), "--quiet"]) == 0
    capsys.readouterr()
    assert main(["certify", str(run), str(tmp_path / "own")]) == 0
    assert "bit-equal" in capsys.readouterr().out


def test_steps_keep_the_order_of_the_command_line():
    given = [
        ("--drop-experts", "12.5%"), ("--by", "random"), ("--drop-experts", "2"), ("--merge-experts", 3),
        ("--split", 16), ("--top-k", 4), ("--to", "moe"), ("--granularity", 2), ("--experts", 8), ("--top-k", 2),
    ]  # fmt: skip
    assert read_steps(given) == [
        Drop(share=0.125, by="random"), Drop(count=2), Merge(3), Split(16, 4), Upcycle(8, 2, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ([("--experts", 8)], "before any step"),
        ([("--drop-experts", "25%"), ("--top-k", 2)], "after --drop-experts"),
        ([("--to", "moe"), ("--top-k", 2)], "no --experts"),
        ([("--split", 4)], "no --top-k"),
        ([("--to", "moe"), ("--experts", 8), ("--experts", 4)], "come once a step"),
        ([("--drop-experts", "some")], "25%"),
    ],
)
def test_options_that_belong_nowhere_are_refused(given, words):
    with pytest.raises(UsageError, match=words):
        read_steps(given)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["nowhere", "--split", "4", "--top-k", "2", "--out", "x"], "nowhere, which does not exist"),
        (["{llama}", "--split", "4", "--top-k", "2"], "add --out DIR"),
        (["{llama}", "--out", "x"], "the steps must be at least one"),
        (["{llama}", "--split", "4", "--top-k", "2", "--by", "clustr", "--out", "x"], "Did you mean 'cluster'"),
        (["{llama}", "--split", "5", "--top-k", "2", "--out", "x"], "divide the hidden width 24"),
        (["{llama}", "--split", "4", "--top-k", "2", "--by", "gradient", "--out", "x"], "add --calibration"),
        (["{llama}", "--split", "4", "--top-k", "2", "--calibration", "gone", "--out", "x"], "gone"),
        (["{llama}", "--drop-experts", "25%", "--by", "random", "--out", "x"], "upcycle or split it first"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(argv, words, llama, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["convert", *(word.replace("{llama}", str(llama)) for word in argv)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error
    assert not list(tmp_path.iterdir())
