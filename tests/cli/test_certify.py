"""``turnout certify`` on folders: what it says, what it writes, what it exits with, and what a user gets wrong."""

import copy
import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from turnout.cli.main import main
from turnout.measure import Certificate
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.recipes import tiny

CONFIG = LMConfig(
    vocab_size=40,
    width=16,
    layers=2,
    heads=2,
    moe=MoEConfig(num_experts=4, top_k=2, hidden=8),
    init_std=0.3,
    max_seq=32,
)
WORDS = "turnout track train signal switch point rail left right ahead stop go".split()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a; same: a copy; bad: two experts swapped; hf: a as Mixtral; run: a in a run folder."""
    root = tmp_path_factory.mktemp("models")
    lm = LM(CONFIG)
    checkpoint.save(root / "a", lm)
    checkpoint.save(root / "same", lm)
    checkpoint.save(root / "run" / "model", lm)
    checkpoint.to_hf(lm, root / "hf")
    bad = copy.deepcopy(lm)
    for tensor in (bad.blocks[1].ff.bank.up, bad.blocks[1].ff.bank.down):
        tensor.data[[0, 2]] = tensor.data[[2, 0]]
    checkpoint.save(root / "bad", bad)
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(["?", *WORDS])}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name in ("a", "same", "bad"):
        tokenizer.save(str(root / name / "tokenizer.json"))
    (root / "prompts.txt").write_text("\n".join(["signal ahead stop", "", "turnout left point right rail"] * 3))
    (root / "ids.jsonl").write_text('[1, 2, 3]\n{"prompt": "train go"}\n{"ids": [4, 5]}\n"left"\n')
    return root


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().out


@pytest.mark.parametrize("other", ["same", "hf", "run"])
def test_equal_models_exit_0(folders: Path, other: str, capsys) -> None:
    assert main(["certify", str(folders / "a"), str(folders / other)]) == 0
    text = said(capsys)
    assert text.startswith("bit-equal: ")
    assert "8 prompts, 256 tokens (random tokens, seed 0)" in text


def test_different_models_exit_1_and_are_told_where_they_part(folders: Path, capsys) -> None:
    prompts = ["--prompts", str(folders / "prompts.txt")]
    assert main(["certify", str(folders / "a"), str(folders / "bad"), *prompts]) == 1
    text = said(capsys)
    assert "different: they part in blocks.1, experts" in text and "blocks.1.ff.bank" in text
    assert "worst prompt" in text and any(f"[{word}]" in text for word in WORDS)
    assert "6 prompts, 24 tokens (prompts of prompts.txt)" in text
    assert main(["certify", str(folders / "a"), str(folders / "bad"), "--json"]) == 1
    assert json.loads(said(capsys))["parted"]["experts"] == [0, 2]


def test_a_bound_makes_them_equal(folders: Path, capsys) -> None:
    assert main(["certify", str(folders / "a"), str(folders / "bad"), "--bound", "100"]) == 0
    assert said(capsys).startswith("within bound: ")


def test_prompts_may_be_ids(folders: Path, capsys) -> None:
    prompts = ["--prompts", str(folders / "ids.jsonl")]
    assert main(["certify", str(folders / "a"), str(folders / "same"), *prompts]) == 0
    assert "4 prompts, 8 tokens" in said(capsys)


def test_a_map(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"blocks.1": null}')
    out = tmp_path / "c.json"
    arguments = ["certify", str(folders / "a"), str(folders / "bad"), "--map", str(tmp_path / "plan.json")]
    assert main([*arguments, "--out", str(out)]) == 1
    certificate = Certificate.from_json(out.read_text())
    assert certificate.names == {"blocks.1": None}
    assert not any(name.startswith("blocks.1") for name in certificate.layers)


@pytest.fixture
def certified(folders: Path, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A certificate of two folders that a test may change."""
    a, b, out = tmp_path / "a", tmp_path / "b", tmp_path / "certificate.json"
    shutil.copytree(folders / "a", a)
    shutil.copytree(folders / "same", b)
    assert main(["certify", str(a), str(b), "--out", str(out)]) == 0
    return a, b, out


def test_a_certificate_names_hashes_versions_and_hardware(certified, capsys) -> None:
    body = json.loads(certified[2].read_text())
    assert body["verdict"] == "bit-equal"
    assert len(body["a"]["weights_sha256"]) == len(body["inputs"]["sha256"]) == 64
    assert body["a"]["config_sha256"] == body["b"]["config_sha256"]
    assert {"cpu", "threads", "torch", "turnout"} <= set(body["context"]) and body["a"]["dtype"] == "float32"


def test_a_certificate_holds_until_something_changes(certified, capsys) -> None:
    a, b, out = certified
    check = ["certify", "--check", str(out), str(a), str(b)]
    assert main(check) == 0
    assert "the certificate holds" in said(capsys)
    changed = checkpoint.load(b)
    changed.norm.weight.data[0] += 1e-6
    checkpoint.save(b, changed)
    assert main(check) == 1
    text = said(capsys)
    assert f"the weights of B ({b}) changed" in text and "of A" not in text
    assert main(["certify", "--check", str(out), str(b), str(a)]) == 1
    assert "the weights of A" in said(capsys)


def test_another_configuration_breaks_it(certified, capsys) -> None:
    a, b, out = certified
    body = json.loads((a / "config.json").read_text())
    body["model"]["rope_theta"] = 500.0
    del body["sha256"]  # as whoever edits it by hand is told to
    (a / "config.json").write_text(json.dumps(body))
    assert main(["certify", "--check", str(out), str(a), str(b)]) == 1
    assert "the configuration of A" in said(capsys)


def test_a_verdict_that_is_no_longer_reached_breaks_it(certified, capsys, monkeypatch) -> None:
    a, b, out = certified
    forward = LM.forward

    def drift(self: LM, *args: object, **kwargs: object):
        result = forward(self, *args, **kwargs)
        if self.origin == b:
            result.logits_BSV[0, 0, 0] += 1
        return result

    monkeypatch.setattr(LM, "forward", drift)
    assert main(["certify", "--check", str(out), str(a), str(b)]) == 1
    assert "it says 'bit-equal', and now they are 'different'" in said(capsys)


def test_windows_are_looked_beyond(tmp_path: Path, capsys) -> None:
    wide = dataclasses.replace(CONFIG, max_seq=256)
    pair = [tmp_path / "a", tmp_path / "b"]
    for folder, window in zip(pair, (None, 80), strict=True):
        checkpoint.save(folder, LM(dataclasses.replace(wide, window=window)))
    assert main(["certify", *map(str, pair)]) == 1, "short inputs see the same of both"
    assert "attention" in said(capsys)
    short = tmp_path / "p.jsonl"
    short.write_text("[1, 2, 3]")
    assert main(["certify", *map(str, pair), "--prompts", str(short)]) == 0
    assert "window is [None, None] in A and [80, 80] in B, which inputs of up to 3 tokens do not show" in said(capsys)


def test_prompts_are_read_whole_whatever_the_tokenizer_cuts_or_pads(folders: Path, tmp_path: Path, capsys) -> None:
    tokenizer = Tokenizer.from_file(str(folders / "a" / "tokenizer.json"))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=7)
    for name in ("a", "bad"):
        shutil.copytree(folders / name, tmp_path / name)
        tokenizer.save(str(tmp_path / name / "tokenizer.json"))
    pair = [str(tmp_path / name) for name in ("a", "bad")]
    main(["certify", *pair, "--prompts", str(folders / "prompts.txt")])
    assert "6 prompts, 24 tokens" in said(capsys)


def test_prompts_are_part_of_a_certificate(folders: Path, tmp_path: Path, capsys) -> None:
    prompts, out = tmp_path / "p.txt", tmp_path / "c.json"
    prompts.write_text("signal ahead")
    pair = [str(folders / "a"), str(folders / "same")]
    assert main(["certify", *pair, "--prompts", str(prompts), "--out", str(out)]) == 0
    assert "signal" not in out.read_text(), "the text is not given away"
    assert main(["certify", "--check", str(out), *pair]) == 2
    assert "add --prompts" in capsys.readouterr().err
    assert main(["certify", "--check", str(out), *pair, "--prompts", str(prompts)]) == 0
    prompts.write_text("signal stop")
    assert main(["certify", "--check", str(out), *pair, "--prompts", str(prompts)]) == 1
    assert "the inputs are others" in said(capsys)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{a}", "nowhere"], "B must exist"),
        (["{a}", "{unfinished}"], "turnout train --resume --out"),
        (["{a}", "{small}"], "have one vocabulary"),
        (["{a}", "{same}", "--prompts", "nothing.txt"], "nothing.txt"),
        (["{a}", "{same}", "--prompts", "{empty}"], "which holds none"),
        (["{a}", "{same}", "--prompts", "{binary}"], "hold prompts"),
        (["{a}", "{same}", "--prompts", "{odd}"], "line 2"),
        (["{a}", "{same}", "--prompts", "{large}"], "token 99 of a vocabulary of 40"),
        (["{hf}", "{hf}", "--prompts", "{text}"], "tokenizer.json"),
        (["{a}", "{same}", "--map", "{odd}"], "a JSON object of names"),
        (["{a}", "{bad}", "--map", "{map}"], "Did you mean 'blocks.1'"),
        (["{a}", "{same}", "--bound", "-1"], "a number above 0"),
        (["{a}", "{same}", "--bound", "0"], "a number above 0"),
        (["{a}", "{same}", "--bound", "nan"], "a number above 0"),
        (["{a}", "{same}", "--check", "nothing.json"], "nothing.json"),
        (["{a}", "{same}", "--check", "{odd}"], "certify the two models again"),
        (["{a}", "{same}", "--check", "{map}", "--out", "x"], "leave --out out"),
        (["{a}", "{truncated}"], "restore it from a copy"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(folders: Path, tmp_path: Path, arguments, words: str, capsys) -> None:
    files = {"empty": b"\n\n", "binary": b"\xff\xfe\x00", "odd": b"[1]\n{1}\n", "large": b"[1, 99]\n"}
    files |= {"map": b'{"block.1": "blocks.1"}', "text": b"go\n"}
    places = {name: folders / name for name in ("a", "same", "bad", "hf")}
    for name, content in files.items():
        places[name] = tmp_path / f"{name}.{'txt' if name in ('empty', 'binary', 'text') else 'jsonl'}"
        places[name].write_bytes(content)
    places |= {name: tmp_path / name for name in ("unfinished", "small", "truncated")}
    places["unfinished"].mkdir()
    (places["unfinished"] / "run.json").write_text(json.dumps(tiny().to_json_dict()))
    checkpoint.save(places["small"], LM(LMConfig(vocab_size=9, width=8, layers=1, heads=2)))
    shutil.copytree(folders / "a", places["truncated"])
    with (places["truncated"] / "model.safetensors").open("r+b") as file:
        file.truncate(500)
    assert main(["certify", *(item.format(**places) for item in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "x").exists()
