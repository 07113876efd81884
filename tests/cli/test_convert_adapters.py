"""``turnout convert --adapters``: folders of PEFT to one folder with a router, and what a user gets wrong."""

import json
import math
from pathlib import Path

import pytest
import torch

from turnout.cli.main import main
from turnout.models import LM, LMConfig, checkpoint
from turnout.models.checkpoint import PeftAdapter, read_adapter, write_adapter
from turnout.recipes.adapters import load_base
from turnout.reshape import attach, attach_folder
from turnout.train.data import train_tokenizer

WORDS = "\n".join(f"line {n}: " + " ".join(str(n * k) for k in range(20)) for n in range(60))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A tiny Llama in "base", two adapters with random factors in "a" and "b", text in "text"."""
    pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("adapters")
    config = LMConfig(vocab_size=300, width=16, layers=2, heads=2, hidden=24, max_seq=64, init_std=0.2)
    checkpoint.to_hf(LM(config).eval(), folder / "base")
    train_tokenizer([WORDS], vocab_size=300).save(str(folder / "base" / "tokenizer.json"))
    chance = torch.Generator().manual_seed(0)
    for name, rank in (("a", 2), ("b", 3)):
        factor = {
            f"model.layers.{layer}.self_attn.{part}_proj": (
                torch.randn(rank, 16, generator=chance),
                torch.randn(16, rank, generator=chance),
                0.1,
            )
            for layer in range(2)
            for part in "qv"
        }
        write_adapter(folder / name, PeftAdapter(name, "somewhere/base", factor))
    (folder / "text").mkdir()
    (folder / "text" / "lines.txt").write_text(WORDS)
    return folder


def convert(place: Path, *arguments: object) -> int:
    shown = [str(place / one) if isinstance(one, str) and (place / one).exists() else str(one) for one in arguments]
    return main(["convert", str(place / "base"), *shown])


def ids() -> torch.Tensor:
    return torch.randint(300, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_the_folder_attaches_to_what_was_measured(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert convert(place, "--adapters", "a", "b", "--top-k", 1, "--calibration", "text", "--out", out) == 0
    said = capsys.readouterr()
    assert "routed by arrow" in said.out and "nats a token" in said.out
    body = json.loads((out / "run.json").read_text())
    assert set(body["loss"]) == {"base", "a", "b", "all, evenly", "routed"}
    assert math.isclose(sum(body["share"].values()), 1, rel_tol=1e-6)
    page = (out / "report.html").read_text()
    assert "What they are worth" in page and "0 q" in page and "http://" not in page and "https://" not in page
    model, report = attach_folder(load_base(place / "base", None), out)
    wanted, _ = attach(load_base(place / "base", None), [place / "a", place / "b"], router_options={"top_k": 1})
    assert torch.equal(model(ids()).logits, wanted(ids()).logits) and report["adapters"] == ["a", "b"]
    assert not list(tmp_path.glob("*.part"))
    assert main(["run", str(out), "--out", str(tmp_path / "again"), "--quiet"]) == 0
    again = json.loads((tmp_path / "again" / "run.json").read_text())
    assert all(again[name] == body[name] for name in ("settings", "loss", "share"))


def test_gates_are_trained_in_the_copies(place, tmp_path):
    out = tmp_path / "out"
    gates = [f"--gate-text={name}={place / 'text'}" for name in "ab"]
    few = ("--calibration-tokens", 256)
    assert convert(place, "--adapters", "a", "b", "--router", "phatgoose", *gates, *few, "--out", out) == 0
    assert len(read_adapter(out / "adapters" / "a").gate) == 4 and not read_adapter(place / "a").gate
    attach_folder(load_base(place / "base", None), out)


def test_a_dry_run_reads_no_weights_and_writes_nothing(place, tmp_path, capsys):
    bare = tmp_path / "base"
    bare.mkdir()
    (bare / "config.json").write_bytes((place / "base" / "config.json").read_bytes())
    assert main(["convert", str(bare), "--adapters", str(place / "a"), str(place / "b"), "--dry-run"]) == 0
    assert "routed by arrow" in capsys.readouterr().out
    assert [file.name for file in bare.iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--adapters", "a", "b", "--router", "arow"), "Did you mean 'arrow'"),
        (("--adapters", "a", "b", "--router", "smear"), "has to learn from tasks first"),
        (("--adapters", "a", "b", "--router", "phatgoose"), "--gate-text a=TEXT"),
        (("--adapters", "a", "b", "--gate-text", "a=x"), "go with phatgoose"),
        (("--adapters", "a", "b", "--gate-text", "a"), "be ADAPTER=PATH"),
        (("--adapters", "a", "b", "--router", "phatgoose", "--gate-text", "z=x"), "unknown adapter 'z'"),
        (("--adapters", "a", "base"), "a folder that has none"),
        (("--adapters", "a", "a"), "each of its own name"),
        (("--adapters", "a", "nowhere"), "does not exist"),
        (("--adapters", "a", "--split", 4), "come without steps"),
        (("--router", "arrow"), "add --adapters"),
        (("--adapters", "a", "--calibration", "nowhere"), "nowhere"),
        (("--adapters", "a", "b", "--top-k", 3), "the number of adapters, 2"),
        (("--adapters", "a", "b", "--top-k", 0), "the number of adapters, 2"),
        (("--adapters", "a", "b", "--router", "even", "--top-k", 1), "options of 'even' must be none"),
        (("--adapters", "a", "b", "--router", "glider"), "what every request asks for"),
        (("--adapters", "a", "--router", "phatgoose", "--gate-text", "a=nowhere"), "nowhere"),
        (("--adapters", "a", "b", "--router", "phatgoose", "--gate-text", "a=text"), "--gate-text b=TEXT"),
    ],
)
def test_what_cannot_be_is_refused_by_the_run_and_the_dry_run_and_nothing_is_left(
    place, tmp_path, capsys, arguments, said
):
    for more in (("--out", tmp_path / "out"), ("--dry-run",)):
        assert convert(place, *arguments, *more) == 2
        assert said in capsys.readouterr().err
        assert not list(tmp_path.iterdir())


def test_factors_that_the_type_cannot_hold_are_refused_by_the_dry_run_too(place, tmp_path, capsys):
    (name, (a, b, scale)), *_ = read_adapter(place / "a").factor.items()
    write_adapter(tmp_path / "c", PeftAdapter("c", "somewhere/base", {name: (a * 1e6, b, scale)}))
    for more in (("--out", tmp_path / "out"), ("--dry-run",)):
        assert convert(place, "--adapters", tmp_path / "c", "--dtype", "float16", *more) == 2
        assert "not finite as torch.float16" in capsys.readouterr().err
    assert convert(place, "--adapters", tmp_path / "c", "--dry-run") == 0


def test_an_adapter_of_another_base_is_refused_unless_told(place, tmp_path, capsys):
    one = read_adapter(place / "a")
    write_adapter(tmp_path / "c", PeftAdapter("c", "somewhere/other", one.factor))
    arguments = ("--adapters", "a", tmp_path / "c", "--out", tmp_path / "out")
    assert convert(place, *arguments) == 2
    assert "other" in capsys.readouterr().err
    assert convert(place, *arguments, "--any-base") == 0
