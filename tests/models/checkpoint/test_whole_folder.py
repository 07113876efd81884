"""Folders appear whole or not at all, and what others have in the place where they are made stays."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from turnout.cli.main import main
from turnout.errors import StorageError
from turnout.models import LM, LMConfig, checkpoint
from turnout.models.checkpoint.whole_folder import whole_folder
from turnout.models.gguf import to_gguf
from turnout.recipes.zipped import unzip_folder, zip_folder
from turnout.reshape import quantize

LITTLE = LMConfig(vocab_size=32, width=32, layers=1, heads=2, hidden=32)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with models, in which ``out.part`` is somebody's."""
    lm = LM(LITTLE)
    checkpoint.save(tmp_path / "own", lm)
    checkpoint.save(tmp_path / "few", quantize(lm, bits=8, group=32)[0])
    zip_folder(tmp_path / "own", tmp_path / "zipped")
    return tmp_path


def written(place: Path) -> dict[str, Any]:
    """What writes something called ``out``, by name."""
    few = checkpoint.load(place / "few")
    return {
        "to_hf": lambda: checkpoint.to_hf(few, place / "out"),
        "zip": lambda: zip_folder(place / "own", place / "out"),
        "unzip": lambda: unzip_folder(place / "zipped", place / "out"),
        "gguf": lambda: to_gguf(few, place / "out", tokenizer=False),
    }


WAYS = ("to_hf", "zip", "unzip", "gguf")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_what_is_stopped_leaves_nothing(way: str, stop: BaseException, place: Path, monkeypatch) -> None:
    before, do = sorted(place.rglob("*")), written(place)[way]
    whole = to_gguf(checkpoint.load(place / "few"), place / "whole", tokenizer=False).size_bytes
    (place / "whole").unlink()
    real, wanted = os.fsync, StorageError if isinstance(stop, OSError) else KeyboardInterrupt
    for nth in range(20):
        left = [nth]

        def fsync(handle: int, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise stop
            real(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        try:
            do()
        except wanted as error:
            if way == "gguf" and (place / "out").exists():  # whole, but nobody knows whether the disk has its name
                assert (place / "out").stat().st_size == whole
                (place / "out").unlink()
            assert sorted(place.rglob("*")) == before
            assert wanted is KeyboardInterrupt or "free some space" in str(error)
        else:
            break
    else:
        raise AssertionError(f"{way} never ends")
    assert nth and (place / "out").exists()


@pytest.mark.parametrize("way", [way for way in WAYS if way != "gguf"])
def test_what_others_have_in_its_place_stays(way: str, place: Path) -> None:
    (place / "out.part").mkdir()
    (place / "out.part" / "thesis.txt").write_text("all of it")
    with pytest.raises(StorageError, match=r"out\.part must be free to write in"):
        written(place)[way]()
    assert (place / "out.part" / "thesis.txt").read_text() == "all of it" and not (place / "out").exists()


def test_an_unfinished_conversion_is_not_wiped_by_another_job(place: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("turnout.recipes.convert._compare", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
    few = ["convert", str(place / "own"), "--bits", "8", "--out", str(place / "out"), "--quiet"]
    assert main(few) == 2
    monkeypatch.undo()
    assert main(["convert", str(place / "own"), "--zip", "--out", str(place / "out"), "--quiet"]) == 2
    assert "out.part must be free" in capsys.readouterr().err
    assert main(few) == 0 and (place / "out" / "config.json").is_file()


def test_a_conversion_that_was_killed_while_it_wrote_goes_on(place: Path, monkeypatch) -> None:
    command = ["convert", str(place / "few"), "--as", "transformers", "--out", str(place / "out"), "--quiet"]
    with monkeypatch.context() as patched:
        patched.setattr("turnout.recipes.convert._compare", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
        assert main(command) == 2
    # As kill -9 leaves it between weights and config.json.
    (place / "out.part" / "done.json").unlink()
    shutil.move(place / "out.part" / "result", place / "out.part" / "result.part")
    assert main(command) == 0 and checkpoint.peek(place / "out").kind == "transformers"


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "away").mkdir()
    (tmp_path / "x.part").symlink_to(tmp_path / "away")
    with pytest.raises(StorageError, match="free to write in"), whole_folder(tmp_path / "x", "here"):
        pass
    assert (tmp_path / "away").is_dir()


def test_who_comes_second_leaves_the_first_ones_work(tmp_path: Path, monkeypatch) -> None:
    """Also where both looked before either had begun."""
    with whole_folder(tmp_path / "out", "here") as aside:
        (aside / "one").write_text("1")
        monkeypatch.setattr(Path, "exists", lambda self, **_: False)
        with pytest.raises(StorageError, match="there already"), whole_folder(tmp_path / "out", "there"):
            pass
        monkeypatch.undo()
    assert (tmp_path / "out" / "one").read_text() == "1"
