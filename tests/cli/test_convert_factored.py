"""``turnout convert`` to factored experts, what ``eval`` and ``sample`` make of them, and out again."""

import pytest

from turnout.cli.convert import read_steps
from turnout.cli.main import main
from turnout.errors import UsageError
from turnout.models import checkpoint
from turnout.recipes.steps import Compress, Densify, Latent, step_from_json, step_json


def test_merged_compressed_evaluated_sampled_and_out_again(run, text, tmp_path, capsys) -> None:
    small, out = tmp_path / "small", tmp_path / "out"
    steps = ["--merge-experts", "2", "--compress-experts", "3", "--rows", "0.1", "--calibration", str(text)]
    assert main(["convert", str(run), *steps, "--out", str(small), "--quiet"]) == 0
    lm = checkpoint.load(small / "model")
    assert lm.config.moe.factored.up_rank == 3 and sum(lm.config.moe.distinct) == 4
    assert main(["eval", str(small)]) == 0
    assert main(["sample", str(small), "--prompt", "document", "--tokens", "4"]) == 0
    capsys.readouterr()
    assert main(["convert", str(small), "--as", "transformers", "--out", str(out), "--quiet"]) != 0
    assert "--densify" in capsys.readouterr().err
    steps = ["--densify", "--as", "transformers", "--out", str(out), "--quiet"]
    assert main(["convert", str(small), *steps]) == 0
    assert checkpoint.from_hf(out).config.moe.factored is None


def test_a_latent_space_and_its_plan(run, tmp_path, capsys) -> None:
    assert main(["convert", str(run), "--latent", "4", "--share", "2", "--dry-run"]) == 0
    assert "rank 4 shared" in capsys.readouterr().out
    assert main(["convert", str(run), "--latent", "4", "--out", str(tmp_path / "out"), "--quiet"]) == 0
    assert checkpoint.load(tmp_path / "out" / "model").config.moe.factored.share == 4


def test_steps_are_read_and_written() -> None:
    given = [("--compress-experts", 8), ("--by", "magnitude"), ("--densify", []), ("--latent", 4), ("--share", 2)]
    steps = [Compress(8, by="magnitude"), Densify(), Latent(4, share=2)]
    assert read_steps(given) == steps
    assert [step_from_json(step_json(step)) for step in steps] == steps
    with pytest.raises(UsageError, match="rows must"):
        read_steps([("--latent", 4), ("--rows", 0.1)])
