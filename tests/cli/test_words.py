"""The command line answers in its own words: flags, never a function's parameters; and quickly where it can."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from turnout.cli.main import main
from turnout.cli.words import in_flags
from turnout.errors import UsageError
from turnout.models import LM, LMConfig, MoEConfig, QuantizedConfig, checkpoint
from turnout.models.gguf.few_bits import check_kind
from turnout.recipes.doctor import _PARTS
from turnout.train.data import train_tokenizer

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"
LINES = "\n".join(f"line {n}: " + " ".join(str(n * k) for k in range(20)) for n in range(60))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dense Llama, a Mixtral of 8 experts, each with a tokenizer, and text."""
    folder = tmp_path_factory.mktemp("words")
    sizes = {"vocab_size": 300, "width": 16, "layers": 2, "heads": 2, "max_seq": 64}
    for name, config in (
        ("dense", LMConfig(**sizes, hidden=24)),
        ("tied", LMConfig(**sizes, hidden=24, tie_embeddings=True)),
        ("moe", LMConfig(**sizes, moe=MoEConfig(8, 2, 12))),
    ):
        checkpoint.to_hf(LM(config), folder / name)
        train_tokenizer([LINES], vocab_size=300).save(str(folder / name / "tokenizer.json"))
    (folder / "text.txt").write_text(LINES)
    (folder / "binary").write_bytes(b"\xff\xfe")
    return folder


CASES = {
    "convert moe --drop-experts 7 --by random": "must leave the top_k=2 of 8 experts.*pass --drop-experts 6",
    "convert moe --drop-experts 0 --by random": "would leave the model as it is.*leave it out",
    "convert moe --drop-experts -1 --by random": "pass --drop-experts 1",
    "convert moe --drop-experts 99% --by random": "got 99%.*pass --drop-experts 6",
    "convert moe --drop-experts 120% --by random": "got 120%",
    "convert moe --drop-experts 1% --by random": "pass --drop-experts 12.5% or more",
    "convert moe --drop-experts abc": "write --drop-experts 25% or --drop-experts 2",
    "convert moe --drop-experts 2 --by foo": "unknown --by of drop_experts 'foo'",
    "convert moe --merge-experts 9 --calibration text.txt": "pass --merge-experts 8",
    "convert moe --merge-experts 0 --calibration text.txt": "pass --merge-experts 1",
    "convert moe --compress-experts 100 --calibration text.txt": "pass --compress-experts 12",
    "convert moe --compress-experts 4 --rows 2 --calibration text.txt": "pass --rows 0.1",
    "convert moe --latent 0": "pass --latent 1",
    "convert moe --latent 99": "pass --latent 16",
    "convert moe --latent 4": r"matrices out \(--densify\).*\(turnout convert --as model\)",
    "convert dense --to moe --experts 4 --top-k 8": "pass --experts 4 --top-k 4 --granularity 1 or --experts 6",
    "convert dense --to moe --experts 4 --top-k 2 --granularity 3": "got 4, 2 and 3.*--granularity 2",
    "convert dense --to moe --experts 4": "add --top-k 2 behind it",
    "convert dense --split 5 --top-k 2": "--split must divide.*pass --split 4",
    "convert dense --split 4 --top-k 9": "pass --top-k 4",
    "convert dense --split 4 --top-k 2 --by gradient": "add --calibration",
    "convert dense --calibration-tokens 0 --calibration text.txt --split 4 --top-k 2": "--calibration-tokens must be",
    "certify dense dense --bound 0": "pass --bound 1e-4, or leave it out",
    "certify dense dense --bound nan": "pass --bound 1e-4",
    "certify dense nowhere": "B must exist",
    "convert moe --bits 3": "--bits must be 4 or 8.*got 3.*write --bits 4",
    "convert moe --bits 16": "write --bits 8",
    "convert moe --bits 4": "--group must divide the 1[26] inputs.*pass --group 4, or --group row",
    "convert moe --bits 4 --group 5": "--group must divide.*got 5",
    "convert moe --bits 8 --codes nf4": "--bits must be 4 with --codes 'nf4'.*pass --bits 4",
    "convert tied --bits 8 --head": "--head must go with an output layer of its own.*leave --head out",
    "convert moe --seed 99999999999999999999 --drop-experts 2 --by random": "--seed must be a whole number of 64 bits",
    "convert moe --zip --calibration text.txt": "--zip must come without steps.*also --calibration",
    "convert moe --gguf f32 --calibration text.txt": "--gguf must come without steps.*also --calibration",
    "convert moe --gguf f32 --dry-run": "--dry-run must go with steps.*--gguf, which has no plan",
    "convert moe": "the steps must be at least one.*--bits 4.*--gguf",
    "parity dp_shard=2 --seed 99999999999999999999": "--seed must be a whole number of 64 bits",
    "doctor nowhere": "MODEL must exist",
    "doctor text.txt": "the folder must hold a model in turnout doctor",
    "sample moe --prompt \udcff": "--prompt must be text.*got the byte 0xff",
    "sample moe --stop \udcff": "--stop must be text",
    "sample moe --tokens 0": "pass --tokens 1",
    "sample moe --tokens 999": "pass --tokens 6[0-9]",
    "sample moe --temperature nan": "--temperature must be a number of at least 0",
    "sample moe --top-k 0": "pass --top-k 1",
    "eval moe": "add --data PATH",
    "eval moe --data text.txt --limit 0": "--limit must be at least 2 tokens",
    "eval moe --data text.txt --trace t": "--trace must be asked of a run",
    "eval moe --data nowhere": "--data must exist",
    "eval moe --data text.txt --token-ids": "add --trace DIR, or leave it out",
    "report moee": "did you mean moe",
    "demo --steps 0": "pass --steps 1",
    "serve moe --max-running 0": "--max-running must be 1 or more.*got 0",
    "serve moe --max-waiting -1": "--max-waiting must be 0 or more",
    "serve moe --request-timeout nan": "--request-timeout must be a finite number of seconds",
    "serve moe --drain-timeout inf": "--drain-timeout must be a finite number of seconds",
    "serve moe --max-body 0": "--max-body must be 1 or more, in MB",
    "serve moe --served-model-name=": "--served-model-name must be a name",
    "serve moe --api-key-file moe": "--api-key-file must be a file of text.*Is a directory",
    "serve moe --api-key-file binary": "--api-key-file must be a file of text.*not UTF-8",
    "cache text.txt": "TRACE must be a folder.*text.txt, a file.*--trace",
    "serve moe --kv-memory 1XB --port 0": "--kv-memory must be bytes, or a number and a unit.*got '1XB'",
    "serve moe --lora moe=moe --port 0": "--lora must have names other than the model's",
    "serve moe --expert-policy lfu --port 0": "--expert-policy must go with --expert-memory",
    "serve moe --expert-memory 1kB --port 0": "--expert-memory must hold the 2.*pass --expert-memory 4608 or more",
    "serve moe --expert-memory 50% --port 0": "--expert-memory must be bytes.*pass --expert-memory 2GB",
    "sample moe --expert-policy lfu": "--expert-policy must go with --expert-memory",
    "sample moe --contrast 0.5 --contrast-rank 99": "--contrast-rank must be at most.*pass --contrast-rank 8",
    "audit moe --batches 3": "--batches must be 4 or more in turnout audit",
    "audit moe --length 0": "--length must be 1 or more",
    "audit moe --bound nan": "--bound must be a finite number above 0",
    "audit moe --bound 0": "--bound must be a finite number above 0",
    "audit moe --seed 99999999999999999999": "--seed must be a whole number of 64 bits",
    "audit moe --length 9999": "must run on rows of 9999 tokens in turnout audit.*max_seq=64",
    "audit text.txt": "in turnout audit; got text.txt",
    "audit torch.nn:Linear": "make one when called without arguments.*TypeError",
    "audit torch.nn:Identity --width -1": "--width must be 1 or more",
}
# What only Python has words for: a parameter with its value, or a function by its full name.
PYTHON = re.compile(r"\b(?!max_seq|hidden|num_experts|vocab_size)[a-z_]+=\S|turnout\.[a-z_]+\.|None|True")


@pytest.mark.parametrize(
    ("fields", "answer"),
    {
        "steps=abc": "must be a whole number in 'steps=abc'; got abc",
        "lr=fast": "must be a number in",
        "only=routers": "must be all or router or adapters .*Nearest fix: write router",
        "dtype=bfloat16": "Nearest fix: write bf16",
        "rank=4": "rank must go with only=adapters .*add only=adapters, or leave rank out",
        "only=router alpha=4": "alpha must go with only=adapters.*add only=adapters, or leave alpha out",
    }.items(),
)
def test_fields_are_answered_in_words(fields, answer, place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    assert main(["train", "--from", "moe", *fields.split(), "--data", "text.txt", "--out", "never"]) == 2
    said = capsys.readouterr().err
    assert re.search(answer, said), said
    assert not (place / "never").exists()


def test_a_flag_says_which_type_it_expects(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "x", "--tokens", "many"])
    assert "argument --tokens: must be a whole number; got 'many'" in capsys.readouterr().err


def test_a_flag_that_is_none_is_told_the_nearest_one_of_its_command(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["sample", "x", "--tokns", "9"])
    said = capsys.readouterr().err
    assert "usage: turnout sample" in said and "unrecognized arguments: --tokns 9; did you mean --tokens?" in said
    with pytest.raises(SystemExit):
        main(["methods", "--zzz"])
    assert "did you mean" not in capsys.readouterr().err


def test_gguf_of_codes_that_it_has_no_type_for_is_told_in_flags() -> None:
    with pytest.raises(UsageError) as refused:
        few = QuantizedConfig(4, 32, parts=("attention", "dense"))
        check_kind(LMConfig(vocab_size=8, width=32, layers=1, heads=2, hidden=64, quantized=few), "mxfp4")
    said = in_flags(str(refused.value), "convert")
    assert "--gguf must hold the numbers that codes mean in turnout convert; got mxfp4" in said
    assert "pass --gguf q8_0 or q4_0, or write the weights out first (--densify)" in said and "turnout." not in said


def test_the_fix_for_a_missing_tokenizer_is_one_that_helps(place, tmp_path, capsys) -> None:
    shutil.copytree(place / "dense", tmp_path / "x", ignore=shutil.ignore_patterns("tokenizer*"))
    for command in (["sample"], ["eval", "--data", str(place / "text.txt")]):
        assert main([command[0], str(tmp_path / "x"), *command[1:]]) == 2
        said = capsys.readouterr().err
        assert f"in turnout {command[0]};" in said and "copy the tokenizer.json that it was trained with" in said
    (tmp_path / "x" / "tokenizer.model").write_text("")
    assert main(["sample", str(tmp_path / "x")]) == 2
    assert "run AutoTokenizer.from_pretrained(" in capsys.readouterr().err


@pytest.mark.parametrize("line", CASES)
def test_flags_are_answered_in_flags(line, place, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    dry = ["--dry-run"] if line.startswith("convert") else []
    assert main([*line.split(), *dry]) == 2
    said = capsys.readouterr().err
    assert re.search(CASES[line], said, re.DOTALL), said
    fix = said.partition("Nearest fix: ")[2] or said
    assert not PYTHON.search(fix), fix


def test_fields_of_a_run_are_written_as_a_shell_takes_them(capsys) -> None:
    assert main(["train", "tiny", "betas=[2,3]", "--show"]) == 2
    assert "pass betas=[0.9,0.95]" in capsys.readouterr().err
    assert main(["train", "tiny", "clip=-1", "--show"]) == 2
    assert "pass clip=null" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "convert nowhere --densify --out o",
        "convert . --to moe --experts 4 --out o",
        "convert . --densify",
        "eval nowhere",
        "sample nowhere",
        "report nowhere",
        "certify nowhere .",
        "run nowhere --out o",
        "train tiny --data nowhere --out o",
        "train --resume --out nowhere",
    ],
)
def test_a_mistake_that_needs_no_torch_does_not_load_it(line) -> None:
    code = f"import sys; from turnout.cli.main import main; print(main({line.split()!r}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"] and "Nearest fix: " in done.stderr


def test_models_of_any_folder_are_sampled_and_measured(place, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(place)
    assert (
        main(["convert", "moe", "--drop-experts", "2", "--by", "random", "--out", str(tmp_path / "c"), "--quiet"]) == 0
    )
    assert main(["convert", "moe", "--as", "model", "--out", str(tmp_path / "own"), "--quiet"]) == 0
    capsys.readouterr()
    found = []
    for folder in ("moe", tmp_path / "c", tmp_path / "own"):
        assert main(["sample", str(folder), "--prompt", "line 1", "--tokens", "4", "--temperature", "0"]) == 0
        assert capsys.readouterr().out.startswith("line 1")
        assert main(["eval", str(folder), "--data", "text.txt", "--json"]) == 0
        values = json.loads(capsys.readouterr().out)["values"]
        found.append(values["bits_per_byte"])
        # All bytes but those of the first token of each row of 64 tokens.
        size = len(LINES.encode())
        assert size * 0.95 < values["bytes"] < size and values["max_vio"] >= 0
    assert found[0] == pytest.approx(found[2], rel=1e-6) and found[0] != found[1]


def test_the_doctor_names_extras_that_exist() -> None:
    """And every library that pyproject.toml asks for, with the extra that asks for it."""
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    extras = {None: project["dependencies"]} | project["optional-dependencies"]
    named = {extra: {name for name, (by, _) in _PARTS.items() if by == extra} for extra in extras}
    wanted = {extra: {re.split(r"[^\w-]", one)[0] for one in wants} for extra, wants in extras.items()}
    assert set(extras) >= {by for by, _ in _PARTS.values()}
    for_people = wanted.keys() - {"all", "dev", "docs"}
    assert {extra: named[extra] for extra in for_people} == {extra: wanted[extra] for extra in for_people}


def test_all_is_every_extra_for_people() -> None:
    extras = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    (everything,) = extras["all"]
    assert set(everything.removeprefix("turnout[").rstrip("]").split(",")) == extras.keys() - {"all", "dev", "docs"}


def test_only_extras_that_exist_are_advised_anywhere() -> None:
    root = PYPROJECT.parent
    known = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    texts = [path for path in root.rglob("*") if path.suffix in (".py", ".md", ".toml", ".txt", ".html", ".yml")]
    files = [path for path in texts if not any(part.startswith(".") for part in path.relative_to(root).parts)]
    assert root / "README.md" in files
    for file in files:
        for extras in re.findall(r"(?:turnout|install.* -e '\.)\[([a-z,]+)\]", file.read_text(encoding="utf-8")):
            assert set(extras.split(",")) <= set(known), f"{file}: {extras}"


@pytest.mark.parametrize("command", ["eval", "sample", "audit"])
def test_a_file_of_llama_cpp_is_named(command, tmp_path, capsys) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF\x03\0\0\0\xff\xfe")
    assert main([command, str(tmp_path / "m.gguf")]) == 2
    said = capsys.readouterr().err
    assert "a file of llama.cpp" in said and "GGUF is written here, not read" in said
