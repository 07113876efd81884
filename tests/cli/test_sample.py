"""``turnout sample``: its flags, several prompts, a stream, and mistakes in its own words."""

import json
import re
import sys
from pathlib import Path

import pytest

from turnout.cli.main import main
from turnout.cli.sample import _Told
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.recipes.sample import Sampling, prompts_in, sample_model
from turnout.train.data import train_tokenizer

LINES = "\n".join(f"line {n}: the cat and the dog é 例え " + " ".join(str(n * k) for k in range(9)) for n in range(40))
PROMPTS = ["the cat", "line 1", "a", "the cat", "the dog and the cat and"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("sample") / "moe"
    sizes = {"vocab_size": 300, "width": 16, "layers": 2, "heads": 2, "max_seq": 64, "init_std": 0.4}
    checkpoint.to_hf(LM(LMConfig(**sizes, moe=MoEConfig(4, 2, 12))), place)
    train_tokenizer([LINES], vocab_size=300).save(str(place / "tokenizer.json"))
    return place


def said(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    code = main(["sample", *map(str, argv)])
    out, err = capsys.readouterr()
    assert code == 0, err
    assert not err, "nothing is told of progress where no terminal is"
    return out


def test_several_prompts_are_each_as_alone(folder, tmp_path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:], "  "]) + "\n")
    drawn = ("--tokens", "9", "--seed", "3", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.1")
    together = said(capsys, folder, "--prompts", file, *drawn).removesuffix("\n").split("\n---\n")
    assert [text[: len(prompt)] for text, prompt in zip(together, PROMPTS, strict=True)] == PROMPTS
    for text, prompt in zip(together[:3], PROMPTS, strict=False):
        assert said(capsys, folder, "--prompt", prompt, *drawn) == text + "\n"
    assert together[3] != together[0]  # a second copy is a second sample


def test_many_prompts_go_on_in_groups_as_together(folder):
    asked = Sampling(tokens=5)
    prompts = [f"line {n % 40}" for n in range(80)]
    together = sample_model(folder, prompts, asked)
    assert together[7] == sample_model(folder, ["line 7"], asked)[0]
    assert together[7:48:40] == sample_model(folder, ["line 7"] * 2, asked)
    assert len(set(together)) == 80


def test_a_stream_is_the_text(folder, capsys):
    asked = Sampling(tokens=20, temperature=1.3, seed=1)
    pieces: list[str] = []
    (text,) = sample_model(folder, ["the cat"], asked, stream=pieces.append)
    assert "".join(pieces) == text == sample_model(folder, ["the cat"], asked)[0] and pieces[0] == "the cat"
    argv = (folder, "--prompt", "the cat", "--tokens", "20", "--temperature", "1.3", "--seed", "1")
    assert said(capsys, *argv, "--stream") == said(capsys, *argv) == text + "\n"


def test_speed_where_nothing_was_added():
    told = _Told(prints=False)
    told("a prompt")
    assert str(told) == "no token was added"
    told(" more")
    assert re.fullmatch(r"first token after \d\.\d\d s \(1 tokens\)", str(told))


def test_on_a_terminal_the_text_comes_as_it_is_made_with_its_speed(folder, capsys, monkeypatch):
    argv = (folder, "--prompt", "the cat", "--tokens", "20", "--temperature", "1.3", "--seed", "1")
    plain = said(capsys, *argv)
    for stream, seen in ((sys.stdout, False), (sys.stderr, True)):
        monkeypatch.setattr(stream, "isatty", lambda: True)
        assert main(["sample", *map(str, argv)]) == 0
        out, err = capsys.readouterr()
        assert out == plain
        assert bool(re.fullmatch(r"first token after \d+\.\d\d s, then \d+\.\d tokens/s \(20 tokens\)\n", err)) == seen
    assert main(["sample", *map(str, argv), "--no-stream"]) == 0
    assert capsys.readouterr().out == plain


def test_stops_and_ends(folder, tmp_path, capsys):
    argv = ("--prompt", "the cat", "--tokens", "30", "--temperature", "1.2")
    whole = said(capsys, folder, *argv).removesuffix("\n")
    stop = whole[12:15]
    at = whole.index(stop, 7)
    assert said(capsys, folder, *argv, "--stop", "nowhere", "--stop", stop) == whole[:at] + "\n"
    assert said(capsys, folder, *argv, "--stop", stop, "--keep-stop") == whole[: at + 3] + "\n"
    lm = checkpoint.from_hf(folder)
    made = lm.generate([[5, 6]], tokens=9, temperature=0)[0].tolist()
    ended = tmp_path / "ended"
    checkpoint.to_hf(lm, ended)
    keys = json.loads((ended / "config.json").read_text())
    (ended / "config.json").write_text(json.dumps(keys | {"eos_token_id": [made[5], 9999]}))
    short, long = (sample_model(ended, ["the"], Sampling(tokens=40, eos=eos))[0] for eos in (None, False))
    assert long.startswith(short) and sample_model(ended, ["the"], Sampling(tokens=40, eos=True))[0] == short


def test_what_turnout_trained_ends_where_the_next_document_begins(tmp_path):
    lm = LM(LMConfig(vocab_size=300, width=16, layers=1, heads=2, max_seq=300, init_std=0.02), seed=0)
    checkpoint.save(tmp_path / "model", lm)
    train_tokenizer([LINES], vocab_size=300).save(str(tmp_path / "model" / "tokenizer.json"))
    shorter = 0
    for seed in range(4):  # nearly flat: 0, the separator, comes in 290 tokens more often than not
        asked = {"tokens": 290, "temperature": 1.0, "seed": seed}
        on, ended = (sample_model(tmp_path / "model", ["cat"], Sampling(**asked, eos=eos))[0] for eos in (False, None))
        assert on.startswith(ended)
        shorter += len(ended) < len(on)
    assert 1 <= shorter <= 4


def test_progress_is_told_on_a_terminal_alone(folder, monkeypatch):
    from turnout.recipes.progress import Silent

    parts: list[tuple[str, int, int]] = []

    class Told(Silent):
        def part(self, what: str, done: int, of: int) -> None:
            parts.append((what, done, of))

    sample_model(folder, ["the cat", "a"], Sampling(tokens=3), progress=Told())
    assert parts == [("tokens", 1, 3), ("tokens", 2, 3), ("tokens", 3, 3)]


MISTAKES = {
    "--top-p 1.5": r"--top-p must be a number from 0 to 1 .*got 1\.5.*pass --top-p 0\.95",
    "--top-p nan": "--top-p must be a number from 0 to 1",
    "--min-p -1": "--min-p must be a number from 0 to 1",
    "--repetition-penalty 0": r"--repetition-penalty must be a number above 0.*pass --repetition-penalty 1\.1",
    "--temperature 0 --min-p 0.1": "--min-p must go with a temperature above 0.*leave --min-p out",
    "--contrast -1": "--contrast must be a number of at least 0",
    "--contrast 1 --contrast-alpha 0": "--contrast-alpha must be a number from 1e-09 to 1",
    "--contrast-rank 2": "--contrast-rank must go with a contrast above 0.*add --contrast 0.5",
    "--contrast 1 --contrast-rank 99": "rank must be at most [0-9]+, as many experts",
    "--top-k 0": "--top-k must be a number of at least 1",
    "--prompts nowhere.txt": r"--prompts must exist.*nowhere\.txt",
    "--prompts empty.txt": r"--prompts must hold text.*empty\.txt: no line with anything on it",
    "--prompts binary.txt": r"--prompts must hold text.*not UTF-8.*one prompt a line",
    "--prompts several.txt --stream": "--stream must be of one prompt .*got 2 prompts",
    "--prompts several.txt --tokens 999": "--tokens must be at most 62: the model takes 64, and the longest .* 2",
    "--temperature inf": "--temperature must be a finite number of at least 0",
    "--prompts long.txt --tokens 4": "the longest prompt, number 2 of 2, must leave room: .* takes 64.* at most 60 ",
    "--stop=": "--stop must be a text to stop at",
    "--keep-stop": "--keep-stop must go with a text to stop at.*got no --stop.*add --stop TEXT",
    "--eos": "--eos must be asked of a model that says how its texts end.*--stop TEXT",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_mistakes_are_told_by_their_flags(flags: str, folder, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x00")
    Path("several.txt").write_text("the cat\nline 1\n")
    Path("long.txt").write_text("the cat\n" + "line 1 " * 99 + "\n")
    assert main(["sample", str(folder), *flags.split()]) == 2
    err = capsys.readouterr().err
    assert re.search(MISTAKES[flags], err, re.DOTALL), err
    assert "Nearest fix: " in err and "Traceback" not in err


def test_one_prompt_or_a_file_of_them(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["sample", "x", "--prompt", "a", "--prompts", "b"])
    assert caught.value.code == 2 and "not allowed with" in capsys.readouterr().err


def test_lines_of_a_file(tmp_path):
    (tmp_path / "x.txt").write_bytes("one\r\n\r\nzwei é\n".encode())
    assert prompts_in(tmp_path / "x.txt") == ("one", "zwei é")
