"""``turnout convert --bits``: what it writes, what eval, sample and certify make of it, out again, and bad input."""

import json

import pytest

from turnout.cli.convert import read_steps
from turnout.cli.main import main
from turnout.errors import UsageError
from turnout.models import checkpoint
from turnout.paths import PackedBank
from turnout.recipes.steps import Densify, Quantize, step_from_json, step_json


def test_in_four_bits_evaluated_sampled_certified_and_out_again(run, text, tmp_path, capsys) -> None:
    few, out = tmp_path / "few", tmp_path / "out"
    steps = ["--bits", "4", "--group", "8", "--method", "gptq", "--act-order", "--calibration", str(text)]
    assert main(["convert", str(run), *steps, "--dry-run"]) == 0
    assert "4 bits in groups of 8" in capsys.readouterr().out
    assert main(["convert", str(run), *steps, "--out", str(few), "--quiet"]) == 0
    lm = checkpoint.load(few / "model")
    assert isinstance(lm.blocks[0].ff.bank, PackedBank) and lm.config.quantized.group == 8
    body = json.loads((few / "run.json").read_text())["conversion"]
    report = body["steps"][0]["report"]["values"]
    assert report["method"] == "gptq" and 0 <= report["kl_nats"] < 1 and report["bits_per_weight"] == 6
    assert body["held_out"]["after"]["bits_per_byte"] > 0
    assert main(["eval", str(few)]) == 0
    assert main(["sample", str(few), "--prompt", "document", "--tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["certify", str(run), str(few), "--bound", "1"]) in (0, 1)
    assert "KL per token" in capsys.readouterr().out
    assert main(["convert", str(few), "--as", "transformers", "--out", str(tmp_path / "packed"), "--quiet"]) == 0
    assert checkpoint.from_hf(tmp_path / "packed", packed=True).config.quantized is not None
    assert main(["convert", str(few), "--densify", "--as", "transformers", "--out", str(out), "--quiet"]) == 0
    assert checkpoint.from_hf(out).config.quantized is None


def test_the_same_run_json_gives_the_same_bits(run, tmp_path) -> None:
    assert main(["convert", str(run), "--bits", "8", "--out", str(tmp_path / "a"), "--quiet"]) == 0
    assert main(["run", str(tmp_path / "a" / "run.json"), "--out", str(tmp_path / "b"), "--quiet"]) == 0
    a, b = ((tmp_path / name / "model" / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    assert checkpoint.load(tmp_path / "a" / "model").config.quantized.group is None


def test_it_is_not_trained(run, text, tmp_path, capsys) -> None:
    few = tmp_path / "few"
    assert main(["convert", str(run), "--bits", "4", "--group", "8", "--out", str(few), "--quiet"]) == 0
    train = ["train", "--from", str(few), "--data", f"numbers={text}", "--out", str(tmp_path / "y"), "--quiet"]
    assert main([*train, "steps=2", "batch=2", "seq=16", "warmup=1"]) == 2
    assert "few bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--bits", "5"], "--bits must be 4 or 8 in turnout convert; got 5"),
        (["--bits", "4", "--group", "7"], "divide the 16 inputs"),
        (["--bits", "4", "--group", "x"], "--group"),
        (["--bits", "4"], "--group 8, or --group row"),
        (["--bits", "8", "--codes", "float"], "codes must be 'int' with bits=8"),
        (["--bits", "4", "--codes", "nf5", "--group", "8"], "Did you mean 'nf4'"),
        (["--bits", "4", "--group", "8", "--method", "gptq"], "--calibration"),
        (["--bits", "4", "--group", "8", "--act-order"], "--method gptq"),
        (["--bits", "4", "--group", "8", "--drop-experts", "1"], "put --bits behind it"),
        (["--bits", "4", "--group", "8", "--bits", "8"], "to round a second time"),
        (["--group", "8"], "come after --bits"),
        (["--bits", "4", "--group", "8", "--codes", "nf4", "--as", "transformers"], "--codes int"),
    ],
)
def test_bad_input_is_refused_and_nothing_is_written(run, tmp_path, capsys, options, said) -> None:
    assert main(["convert", str(run), *options, "--out", str(tmp_path / "out"), "--quiet"]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_steps_are_read_and_written() -> None:
    given = [("--bits", 4), ("--group", "32"), ("--codes", "nf4"), ("--head", []), ("--densify", []), ("--bits", 8)]
    steps = [Quantize(4, 32, "nf4", head=True), Densify(), Quantize(8, None)]
    assert read_steps(given) == steps
    assert [step_from_json(step_json(step)) for step in steps] == steps
    assert read_steps([("--bits", 4)]) == [Quantize(4, 64)] and read_steps([("--bits", 4), ("--group", "row")]) == [
        Quantize(4, None)
    ]
    with pytest.raises(UsageError, match="--group"):
        read_steps([("--bits", 4), ("--group", "0")])
