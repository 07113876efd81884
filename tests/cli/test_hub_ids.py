"""``org/name`` wherever a command takes a model's folder; the cache is made here, and the network is never asked."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from turnout.cli.main import main
from turnout.errors import UsageError
from turnout.models import LM, LMConfig, checkpoint
from turnout.models.checkpoint import PeftAdapter, read_adapter, write_adapter
from turnout.recipes.adapters import load_base
from turnout.reshape import attach, save_adapters
from turnout.train.data import train_tokenizer

WORDS = "\n".join(f"line {n}: " + " ".join(str(n * k) for k in range(20)) for n in range(60))
FIRST, SECOND = "1" * 40, "2" * 40


def put(folder: Path, cache: Path, repo: str, commit: str) -> Path:
    """Moves a folder into the cache, as the commit that main is at."""
    home = cache / f"models--{repo.replace('/', '--')}"
    place = home / "snapshots" / commit
    (home / "blobs").mkdir(parents=True, exist_ok=True)
    (home / "refs").mkdir(exist_ok=True)
    place.mkdir(parents=True)
    for file in sorted(folder.iterdir()):
        shutil.move(file, home / "blobs" / f"{commit[0]}-{file.name}")
        (place / file.name).symlink_to(Path("..", "..", "blobs", f"{commit[0]}-{file.name}"))
    (home / "refs" / "main").write_text(commit)
    return place


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home with a tiny Llama, of which main was another commit before, and two adapters of it."""
    place = tmp_path_factory.mktemp("home")
    chance, config = torch.Generator().manual_seed(0), LMConfig(
        vocab_size=300, width=16, layers=2, heads=2, hidden=24, max_seq=64, init_std=0.2
    )  # fmt: skip
    for number, commit in enumerate((FIRST, SECOND), 1):
        lm = LM(config).eval()
        lm.embedding.data.mul_(number)
        checkpoint.to_hf(lm, place / "made")
        train_tokenizer([WORDS], vocab_size=300).save(str(place / "made" / "tokenizer.json"))
        put(place / "made", place / "hub", "somewhere/base", commit)
    for name in "ab":
        factor = {
            f"model.layers.{layer}.self_attn.q_proj": (
                torch.randn(2, 16, generator=chance),
                torch.randn(16, 2, generator=chance),
                0.1,
            )
            for layer in range(2)
        }
        write_adapter(place / name, PeftAdapter(name, "somewhere/base", factor))
        put(place / name, place / "hub", f"somewhere/{name}", FIRST)
    (place / "text").mkdir()
    (place / "text" / "lines.txt").write_text(WORDS)
    return place


@pytest.fixture
def home(filled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(filled / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return filled


def test_convert_records_the_commit_and_does_it_again_when_main_has_moved(home, tmp_path, capsys):
    asked = ["--to", "moe", "--experts", "2", "--top-k", "1", "--out"]
    assert main(["convert", "somewhere/base", *asked, "out", "--quiet"]) == 0
    body = json.loads(Path("out", "run.json").read_text())["conversion"]
    assert body["source"] == f"somewhere/base@{SECOND}"
    assert json.loads(Path("out", "certificate.json").read_text())["a"]["name"] == f"somewhere/base@{SECOND}"
    assert load_base("out", None).config.vocab_size == 300 and Path("out", "tokenizer.json").is_file()
    assert not any(file.is_symlink() for file in Path("out").iterdir())
    moved = home / "hub" / "models--somewhere--base" / "refs" / "main"
    moved.write_text(FIRST)
    try:
        assert main(["run", "out/run.json", "--out", "again", "--quiet"]) == 0
    finally:
        moved.write_text(SECOND)
    assert Path("again", "model.safetensors").read_bytes() == Path("out", "model.safetensors").read_bytes()


def test_a_plan_needs_no_more_than_the_name(home, capsys):
    assert main(["convert", "somewhere/base", "--split", "4", "--top-k", "2", "--by", "cluster", "--dry-run"]) == 0
    assert "writes MixtralForCausalLM" in capsys.readouterr().out


def test_certify_eval_and_sample(home, capsys):
    assert main(["certify", "somewhere/base", f"somewhere/base@{SECOND}", "--out", "same.json"]) == 0
    sides = json.loads(Path("same.json").read_text())
    assert sides["a"]["name"] == sides["b"]["name"] == f"somewhere/base@{SECOND}"
    assert main(["certify", "--check", "same.json", "somewhere/base", "somewhere/base"]) == 0
    assert main(["certify", "somewhere/base", f"somewhere/base@{FIRST}"]) == 1
    capsys.readouterr()
    assert main(["eval", "somewhere/base", "--data", str(home / "text"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["context"]["run"] == f"somewhere/base@{SECOND}"
    assert main(["sample", "somewhere/base", "--prompt", "line", "--tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("line")


def test_adapters_and_their_base(home, tmp_path, capsys):
    names = ["somewhere/a", "somewhere/b"]
    assert main(["convert", "somewhere/base", "--adapters", *names, "--dry-run"]) == 0
    assert main(["convert", "somewhere/base", "--adapters", *names, "--out", "out", "--quiet"]) == 0
    asked = json.loads(Path("out", "run.json").read_text())["settings"]
    assert asked["source"] == f"somewhere/base@{SECOND}"
    assert asked["adapters"] == [f"{name}@{FIRST}" for name in names]
    assert sorted(place.name for place in Path("out", "adapters").iterdir()) == ["a", "b"]
    assert not any(file.is_symlink() for file in Path("out").rglob("*"))
    assert main(["run", "out/run.json", "--out", "again", "--quiet"]) == 0
    assert read_adapter("somewhere/a").name == "a"
    attach(load_base("somewhere/base", None), names)
    assert save_adapters(tmp_path / "saved", names, router="arrow")["adapters"] == ["a", "b"]


def test_in_python(home):
    lm = checkpoint.from_hf("somewhere/base")
    assert torch.equal(lm.embedding, checkpoint.from_hf(f"somewhere/base@{SECOND}").embedding)
    assert torch.equal(lm.embedding, 2 * checkpoint.from_hf(f"somewhere/base@{FIRST}").embedding)
    assert checkpoint.peek("somewhere/base").config == lm.config
    checkpoint.to_hf(lm, "out")
    assert torch.equal(checkpoint.from_hf(home / "hub" / "models--somewhere--base").embedding, lm.embedding)
    with pytest.raises(UsageError, match="not in the cache"):
        checkpoint.from_hf("somewhere/else")


@pytest.mark.parametrize("command", [["convert", "a/b", "--as", "model", "--out", "x"], ["sample", "a/b"]])
def test_offline_a_name_that_is_not_there(command, home, capsys):
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "a/b, which is not in the cache" in said and "hf download a/b" in said and "HF_HUB_OFFLINE" in said


@pytest.mark.slow
def test_from_a_shell_with_hf_home(filled, tmp_path):
    environment = {**os.environ, "HF_HOME": str(filled), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, "-m", "turnout", "sample", "somewhere/base", "--prompt", "line", "--tokens", "2"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("line"), done.stderr
