"""What is wrong with a model on disk: one line that says what, where and what to do; exit code 2; nothing written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turnout.cli.main import main
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.train.data import train_tokenizer

TEXT = " ".join(str(n * n) for n in range(4000))
Harm = Callable[[Path], object]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> Path:
    """A folder of transformers, in several shards."""
    folder = tmp_path_factory.mktemp("hf") / "mixtral"
    moe = MoEConfig(num_experts=4, top_k=2, hidden=24)
    config = LMConfig(vocab_size=300, width=16, layers=2, heads=2, max_seq=64, moe=moe)
    assert checkpoint.to_hf(LM(config).eval(), folder, shard_bytes=8_000) == "MixtralForCausalLM"
    train_tokenizer([TEXT], vocab_size=300).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def ours(tmp_path_factory, theirs) -> Path:
    """The same in turnout's own format."""
    folder = tmp_path_factory.mktemp("own") / "model"
    checkpoint.save(folder, checkpoint.from_hf(theirs))
    shutil.copy(theirs / "tokenizer.json", folder)
    return folder


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model*.safetensors"))


def keys(path: Path, **changed: object) -> None:
    """Changes keys of config.json; None takes one away."""
    body = json.loads((path / "config.json").read_text()) | changed
    (path / "config.json").write_text(json.dumps({name: value for name, value in body.items() if value is not None}))


def rewrite(file: Path, change: Callable[[dict], dict]) -> None:
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def holding(path: Path, name: str) -> Path:
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return path / index["weight_map"][name]


def reshaped(path: Path) -> None:
    rewrite(holding(path, "model.norm.weight"), lambda tensors: tensors | {"model.norm.weight": torch.ones(7)})


def renamed(path: Path) -> None:
    rewrite(
        holding(path, "model.norm.weight"),
        lambda tensors: {name.replace("model.norm", "model.morn"): tensor for name, tensor in tensors.items()},
    )


def cut(file: Path, keep: Callable[[bytes], bytes]) -> None:
    file.write_bytes(keep(file.read_bytes()))


def index_lists_more(path: Path) -> None:
    file = path / "model.safetensors.index.json"
    body = json.loads(file.read_text())
    body["weight_map"]["model.layers.2.input_layernorm.weight"] = shards(path)[0].name
    file.write_text(json.dumps(body))


def pickled(path: Path) -> None:
    for file in [*shards(path), path / "model.safetensors.index.json"]:
        file.unlink()
    (path / "pytorch_model.bin").write_bytes(b"PK\3\4")


THEIRS: dict[str, tuple[Harm, str]] = {
    "missing shard": (lambda path: shards(path)[1].unlink(), "missing in {path}: model-00002-of"),
    "every shard missing": (
        lambda path: [file.unlink() for file in shards(path)],
        "copy or download the missing files",
    ),
    "truncated shard": (lambda path: cut(shards(path)[0], lambda data: data[:-8]), "it is truncated or damaged"),
    "truncated header": (lambda path: cut(shards(path)[0], lambda data: data[:40]), "it is truncated or damaged"),
    "empty shard": (lambda path: cut(shards(path)[0], lambda data: b""), "it is truncated or damaged"),
    "not safetensors": (lambda path: cut(shards(path)[0], lambda data: b"\xff" * 99), "it is truncated or damaged"),
    "wrong shape": (reshaped, "shape (7,) for model.norm.weight"),
    "wrong config": (lambda path: keys(path, intermediate_size=32), "have the shape"),
    "renamed tensor": (renamed, "model.morn.weight"),
    "index of other shards": (index_lists_more, "1 missing (model.layers.2.input_layernorm.weight)"),
    "mixed dtypes": (
        lambda path: (
            rewrite(shards(path)[0], lambda tensors: {n: t.bfloat16() for n, t in tensors.items()}),
            keys(path, dtype="float16"),
        ),
        "(turnout convert --dtype float32)",
    ),
    "whole numbers": (
        lambda path: rewrite(shards(path)[0], lambda tensors: {n: t.to(torch.int8) for n, t in tensors.items()}),
        "they are packed or quantised",
    ),
    "misspelt architecture": (
        lambda path: keys(path, model_type="mixtrall", architectures=["MixtrallForCausalLM"]),
        "Did you mean 'MixtralForCausalLM'? Available: DeepseekV2",
    ),
    "architecture we lack": (
        lambda path: keys(path, model_type="gemma3", architectures=["Gemma3ForConditionalGeneration"]),
        "It has a part that sees images (docs/guides/convert.md says how",
    ),
    "architecture nobody knows": (
        lambda path: keys(path, model_type="zzz", architectures=["ZzzForCausalLM"]),
        "config.json. Available: DeepseekV2ForCausalLM",
    ),
    "quantised": (lambda path: keys(path, quantization_config={"quant_method": "awq"}), "dequantise it"),
    "pickled": (pickled, "pytorch_model.bin is pickled and never read"),
    "config.json cut off": (lambda path: cut(path / "config.json", lambda data: data[:-9]), "be JSON"),
    "config.json a list": (lambda path: (path / "config.json").write_text("[]"), "hold an object"),
    "config.json gone": (lambda path: (path / "config.json").unlink(), "neither config.json nor run.json"),
    "a size missing": (lambda path: keys(path, hidden_size=None, intermediate_size="many"), "config.json"),
    "tokenizer gone": (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json"),
    "tokenizer damaged": (lambda path: (path / "tokenizer.json").write_text("{"), "tokenizer.json"),
}
OURS: dict[str, tuple[Harm, str]] = {
    "weights gone": (lambda path: shards(path)[0].unlink(), "which does not exist"),
    "weights truncated": (lambda path: cut(shards(path)[0], lambda data: data[:-8]), "have"),
    "a byte of the weights altered": (
        lambda path: cut(shards(path)[0], lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]),
        "another SHA-256",
    ),
    "config.json of another version": (lambda path: keys(path, format="turnout.lm/99"), "be of format 'turnout.lm/1'"),
    "config.json without its files": (lambda path: keys(path, files=None), "be whole"),
}
CASES = [("theirs", *case) for case in THEIRS.items()] + [("ours", *case) for case in OURS.items()]


@pytest.mark.parametrize(("kind", "name", "case"), CASES, ids=[f"{kind}-{name}" for kind, name, _ in CASES])
def test_a_damaged_model_is_refused_in_one_line(theirs, ours, tmp_path, capsys, kind, name, case):
    harm, words = case
    path, text = tmp_path / "in", tmp_path / "text.txt"
    shutil.copytree({"theirs": theirs, "ours": ours}[kind], path)
    text.write_text(TEXT)
    harm(path)
    before = sorted(tmp_path.rglob("*"))
    options = ["--drop-experts", "1", "--calibration", str(text), "--calibration-tokens", "300"]
    assert main(["convert", str(path), *options, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert words.format(path=path) in said.err, said.err
    assert (
        said.out == "" and "Traceback" not in said.err and said.err.splitlines()[-1].startswith("turnout convert: er")
    )
    assert sorted(tmp_path.rglob("*")) == before
    if "tokenizer" not in name and name != "config.json gone":  # what looks at no text needs none, and words differ
        assert main(["certify", str(path), str(theirs)]) == 2
        assert words.format(path=path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("nowhere", "which does not exist"),
        ("empty", "neither config.json nor run.json"),
        ("file", "neither config.json"),
    ],
)
def test_what_is_no_folder_of_a_model(tmp_path, capsys, path, words):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = sorted(tmp_path.rglob("*"))
    argv = ["convert", str(tmp_path / path), "--drop-experts", "1", "--by", "random", "--out", str(tmp_path / "out")]
    assert main(argv) == 2
    assert words in capsys.readouterr().err and sorted(tmp_path.rglob("*")) == before


def test_whole_numbers_are_no_weights_whatever_is_asked(theirs, tmp_path, capsys):
    path = shutil.copytree(theirs, tmp_path / "in")
    rewrite(shards(path)[0], lambda tensors: {name: tensor.to(torch.int8) for name, tensor in tensors.items()})
    argv = ["convert", str(path), "--drop-experts", "1", "--by", "random", "--dtype", "float32"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 2
    assert "I8 (lm_head.weight)" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_mixed_dtypes_are_read_as_one_when_asked(theirs, tmp_path, capsys, dtype):
    path = shutil.copytree(theirs, tmp_path / "in")
    rewrite(shards(path)[0], lambda tensors: {name: tensor.bfloat16() for name, tensor in tensors.items()})
    argv = ["convert", str(path), "--drop-experts", "1", "--by", "random", "--dtype", dtype, "--quiet"]
    assert main([*argv, "--out", str(tmp_path / "out")]) == 0
    assert checkpoint.peek(tmp_path / "out").dtype == getattr(torch, dtype)
    capsys.readouterr()


@pytest.mark.parametrize("change", [{"--seed": "1"}, {"--drop-experts": "2"}])
def test_another_conversion_in_the_same_place_is_refused(theirs, tmp_path, capsys, monkeypatch, change):
    """The first is stopped on the way; its work stays, and is gone on with by the same command."""
    options = {"--drop-experts": "1", "--by": "random", "--out": str(tmp_path / "out")}
    monkeypatch.setattr("turnout.recipes.convert._compare", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    assert main(["convert", str(theirs), *(word for pair in options.items() for word in pair)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "free some space" in error and "the same command goes on from there" in error
    assert "No space" in (tmp_path / "out.part" / "error.txt").read_text()
    monkeypatch.undo()
    other = options | change if "--seed" not in change else change | options
    assert main(["convert", str(theirs), *(word for pair in other.items() for word in pair)]) == 2
    said = capsys.readouterr().err
    assert ("with --seed 0, not 1" if "--seed" in change else "with steps") in said and "to begin anew" in said
    assert not (tmp_path / "out").exists() and (tmp_path / "out.part" / "result" / "config.json").exists()
    assert main(["convert", str(theirs), *(word for pair in options.items() for word in pair), "--quiet"]) == 0
    assert (tmp_path / "out" / "run.json").exists() and not (tmp_path / "out.part").exists()


@pytest.mark.parametrize("command", ["train tiny", "train --from {x}", "eval {x}", "sample {x}", "convert {x}", "demo"])
def test_a_misspelt_device_is_refused_before_torch_loads(command: str, tmp_path: Path) -> None:
    """In the words of the command line, and with nothing written."""
    words = [*command.format(x=tmp_path).split(), "--device", "gpu"]
    words += ["--out", "out"] * (words[0] in ("train", "convert", "demo"))
    code = f"import sys; from turnout.cli import main; print(main({words!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n" and not list(tmp_path.iterdir())
    said = f"error: --device must be auto, cpu, cuda, cuda:N (the N-th, from 0) or mps in turnout {words[0]}; got 'gpu'"
    assert said in done.stderr and done.stderr.endswith("Nearest fix: pass --device auto.\n")


@pytest.mark.parametrize(("source", "library"), [("texts", "pyarrow"), ("hf:some_set", "datasets")])
def test_a_missing_extra_is_named_and_leaves_no_folder(source, library, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.parquet").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    assert main(["train", "tiny", "--data", source, "--out", "run", "--quiet"]) == 2
    assert f"{library} must be installed to read" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["texts"]
