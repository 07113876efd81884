"""A conversion that was stopped, by whatever, goes on to the same bits; until then nothing passes for whole."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import hf_folders as folders
import pytest
import torch

from turnout import storage
from turnout.errors import CheckpointError, Interrupted, StorageError, UsageError
from turnout.models import LM, LMConfig, checkpoint
from turnout.recipes import convert as converting
from turnout.recipes import partial
from turnout.recipes.convert import convert
from turnout.recipes.steps import Drop, Merge, Split
from turnout.train.folder import locked

CHAIN = [Split(4, 2, by="coactivation"), Drop(count=1), Merge(2)]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A dense folder of ours, with a tokenizer."""
    folder = tmp_path_factory.mktemp("own") / "dense"
    config = LMConfig(vocab_size=300, width=16, layers=3, heads=2, hidden=24, max_seq=32, init_std=0.3)
    checkpoint.save(folder, LM(config).eval())
    folders.train_tokenizer([folders.TEXT], vocab_size=300).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "a.txt"
    file.write_text(folders.TEXT)
    return file


def chain(source: Path, text: Path, out: Path, **keywords):
    return convert(source, CHAIN, out, text=text, text_tokens=600, **keywords)


@pytest.fixture(scope="module")
def whole(source, text, tmp_path_factory) -> dict[str, bytes | dict]:
    """What an undisturbed conversion gives."""
    out = tmp_path_factory.mktemp("whole") / "out"
    chain(source, text, out)
    return contents(out)


def contents(out: Path) -> dict[str, bytes | dict]:
    """The files of a result, without what says where and how it was made."""
    assert not out.with_name(out.name + ".part").exists()
    assert {file.suffix for file in out.rglob("*") if file.is_file()} <= {".json", ".safetensors", ".html"}
    found = {file.name: file.read_bytes() for file in out.rglob("*.safetensors")}
    body = json.loads((out / "run.json").read_text())["conversion"]
    return found | {"config": json.loads((out / "config.json").read_text()), "steps": body["steps"]} | body["held_out"]


class StopError(Exception):
    """A defect, say."""


def stop_at(monkeypatch, number: int, error: BaseException) -> None:
    """The ``number``-th flush to the disk, counted from 0, fails."""
    flush, calls = storage.flush, iter(range(10**6))

    def fail(path: Path) -> None:
        if next(calls) == number:
            raise error
        flush(path)

    monkeypatch.setattr(storage, "flush", fail)


def count_flushes(monkeypatch, source: Path, text: Path, out: Path) -> int:
    flush, calls = storage.flush, []
    monkeypatch.setattr(storage, "flush", lambda path: (calls.append(path), flush(path)))
    chain(source, text, out)
    monkeypatch.undo()
    return len(calls)


def stop_and_go_on(source, text, out, whole, monkeypatch, number: int, error: BaseException) -> str:
    """Stops at one flush, looks at what is there, goes on, and compares; returns what was said on going on."""
    stop_at(monkeypatch, number, error)
    kinds = {OSError: StorageError, KeyboardInterrupt: Interrupted, StopError: StopError}
    with pytest.raises(kinds[type(error)]) as caught:
        chain(source, text, out)
    monkeypatch.undo()
    assert not out.exists()
    part = out.with_name(out.name + ".part")
    if part.exists() and not isinstance(error, KeyboardInterrupt):
        said = (part / "error.txt").read_text()
        assert "Traceback" in said and str(error.args[-1]) in said
        assert "same command goes on" in str(caught.value) + "".join(getattr(caught.value, "__notes__", ()))
    heard: list[str] = []
    chain(source, text, out, say=heard.append)
    assert contents(out) == whole
    return "\n".join(heard)


@pytest.mark.parametrize(
    ("error", "share"),
    [(OSError(errno.ENOSPC, "No space left on device"), 0.1), (KeyboardInterrupt(), 0.45), (StopError("boom"), 0.97)],
    ids=["no space", "interrupted", "failed"],
)
def test_stopped_somewhere_it_goes_on_to_the_same_bits(source, text, whole, tmp_path, monkeypatch, error, share):
    flushes = count_flushes(monkeypatch, source, text, tmp_path / "counted")
    said = stop_and_go_on(source, text, tmp_path / "out", whole, monkeypatch, int(share * flushes), error)
    assert "going on with what" in said
    assert ("step 1 of 3" in said) == (share < 0.9), "what is written is not made again"


@pytest.mark.slow
def test_stopped_anywhere_it_goes_on_to_the_same_bits(source, text, whole, tmp_path, monkeypatch):
    first = random.randrange(2)
    print("first", first)
    for number in range(first, count_flushes(monkeypatch, source, text, tmp_path / "counted"), 2):
        error = OSError(errno.ENOSPC, "No space left on device")
        stop_and_go_on(source, text, tmp_path / f"out{number}", whole, monkeypatch, number, error)


KILLED = """
import os, signal, sys
from turnout.recipes import partial
put = partial.Pieces.put
left = [int(sys.argv[1])]
def dies(self, name, piece):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, name, piece)
partial.Pieces.put = dies
from turnout.cli.main import main
main(sys.argv[2:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("puts", [1, 7])
def test_killed_in_the_middle_of_a_step_the_same_command_goes_on(source, text, tmp_path, puts):
    options = "--split 4 --top-k 2 --by coactivation --drop-experts 1".split()
    argv = ["convert", str(source), *options, "--calibration", str(text), "--calibration-tokens", "600"]
    command = [sys.executable, "-c", KILLED, str(puts), *argv, "--out", str(tmp_path / "out")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == -signal.SIGKILL
    part = tmp_path / "out.part"
    assert not (tmp_path / "out").exists() and len(list((part / "kept").rglob("*.safetensors"))) >= 1
    again = [sys.executable, "-m", "turnout", *argv, "--out", str(tmp_path / "out")]
    done = subprocess.run(again, check=True, capture_output=True, text=True)
    assert "going on with what" in done.stderr and not part.exists()
    subprocess.run([*again[:-1], str(tmp_path / "plain")], check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "plain")


def half(source: Path, text: Path, out: Path, monkeypatch) -> Path:
    """Stops in the first step."""
    stop_at(monkeypatch, 9, StopError("boom"))
    with pytest.raises(StopError):
        chain(source, text, out)
    monkeypatch.undo()
    return out.with_name(out.name + ".part")


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"seed": 1}, "--seed 0, not 1"),
        ({"dtype": torch.bfloat16}, "--dtype null, not torch.bfloat16"),
        ({"text_tokens": 500}, "text of digest"),
        ({"steps": [Split(4, 2)]}, "steps"),
    ],
)
def test_other_settings_are_refused_and_nothing_is_lost(source, text, tmp_path, monkeypatch, whole, keywords, words):
    part = half(source, text, tmp_path / "out", monkeypatch)
    before = sorted(part.rglob("*"))
    with pytest.raises(UsageError, match=words) as caught:
        convert(source, **{"steps": CHAIN, "out": tmp_path / "out", "text": text, "text_tokens": 600} | keywords)
    assert f"remove {part} to begin anew" in str(caught.value)
    assert sorted(part.rglob("*")) == before
    chain(source, text, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_another_model_in_the_same_place_is_refused(source, text, tmp_path, monkeypatch):
    moved = tmp_path / "model"
    checkpoint.save(moved, checkpoint.load(source))
    (moved / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    half(moved, text, tmp_path / "out", monkeypatch)
    lm = checkpoint.load(moved)
    with torch.no_grad():
        lm.embedding += 1
    checkpoint.save(moved, lm)
    with pytest.raises(UsageError, match="the model's files"):
        chain(moved, text, tmp_path / "out")


def test_a_piece_that_was_damaged_is_named(source, text, tmp_path, monkeypatch):
    part = half(source, text, tmp_path / "out", monkeypatch)
    piece = sorted((part / "kept").rglob("*.safetensors"))[0]
    piece.write_bytes(piece.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=piece.name):
        chain(source, text, tmp_path / "out")


def test_a_piece_of_the_same_size_with_other_numbers_is_refused(source, text, tmp_path, monkeypatch):
    part = half(source, text, tmp_path / "out", monkeypatch)
    piece = sorted((part / "kept").rglob("*.safetensors"))[0]
    data = bytearray(piece.read_bytes())
    data[-3] ^= 1
    piece.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{piece.name}.*its content is not what its sha256 says"):
        chain(source, text, tmp_path / "out")


@pytest.mark.parametrize("name", ["done.json", "result"])
def test_a_result_that_changes_before_it_is_compared_is_refused(source, text, tmp_path, monkeypatch, name):
    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "_compare", stop)
    with pytest.raises(Interrupted):
        chain(source, text, tmp_path / "out")
    monkeypatch.undo()
    part = tmp_path / "out.part"
    file = part / name if name == "done.json" else next((part / "result").rglob("*.safetensors"))
    data = bytearray(file.read_bytes())
    place = data.index(b"bits_per_byte") + 20 if name == "done.json" else len(data) - 3
    data[place] = ord("7") if data[place] == ord("6") else ord("6")
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match="the result must be as it was written"):
        chain(source, text, tmp_path / "out")


def test_two_processes_do_not_convert_in_one_place(source, text, tmp_path):
    with locked(tmp_path / "out.part"), pytest.raises(UsageError, match=f"in which process {os.getpid()} is convert"):
        chain(source, text, tmp_path / "out")


def test_what_a_reshape_refuses_leaves_nothing(source, text, tmp_path, monkeypatch):
    """A mistake that shows only on the way."""

    def refuse(*arguments, **keywords):
        raise UsageError("the router must give logits")

    monkeypatch.setattr("turnout.recipes.steps.drop_experts", refuse)
    with pytest.raises(UsageError, match="give logits"):
        chain(source, text, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_before_anything_is_finished_nothing_is_left(source, text, tmp_path, monkeypatch):
    def stop(*arguments, **keywords):
        raise KeyboardInterrupt

    monkeypatch.setattr(converting, "_load", stop)
    with pytest.raises(Interrupted, match="nothing was written"):
        chain(source, text, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_says_how_much_and_keeps_what_is_finished(source, text, tmp_path, monkeypatch, whole):
    def fail(*arguments, **keywords):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 123 bytes")

    monkeypatch.setattr(converting, "_write", fail)
    with pytest.raises(partial.MemoryShortError, match=r"about .* GB.*goes on from there"):
        chain(source, text, tmp_path / "out")
    monkeypatch.undo()
    assert "can't allocate memory" in (tmp_path / "out.part" / "error.txt").read_text()
    chain(source, text, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_an_empty_part_folder_is_taken(source, text, tmp_path):
    """Killed before the first file was there."""
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / ".lock").touch()
    chain(source, text, tmp_path / "out")


def test_progress_counts_layers_and_batches(source, text, tmp_path):
    told: list[tuple[str, int, int]] = []
    chain(source, text, tmp_path / "out", part=lambda *piece: told.append(piece))
    assert [piece for piece in told if piece[0] == "dealing out neurons"] == [
        ("dealing out neurons", layer, 3) for layer in range(4)
    ]
    assert {"held-out text", "scoring experts", "counting tokens", "matching neurons", "comparing"} <= {
        what for what, _, _ in told
    }


def test_held_out_text_is_text_that_no_step_sees(source, text, tmp_path):
    done = chain(source, text, tmp_path / "out")
    held_out, found = done.record["held_out"], done.record["calibration"]
    assert 560 <= found["tokens"] <= 600 and found["held_out_tokens"] >= 32
    lm = checkpoint.load(tmp_path / "out")
    assert 0 < held_out["before"]["bits_per_byte"] < 30 and held_out["before"]["load"] == []
    assert held_out["after"]["bits_per_byte"] != held_out["before"]["bits_per_byte"]
    assert [len(load_E) for load_E in held_out["after"]["load"]] == [lm.config.moe.num_experts] * 3
    assert all(sum(load_E) == pytest.approx(1) for load_E in held_out["after"]["load"])
    assert "bits per byte before" in done.summary()
