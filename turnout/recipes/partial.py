"""A conversion that is not finished: its folder ``OUT.part``, what is kept there to go on, and how it ends."""

import contextlib
import json
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from turnout import reading
from turnout.errors import CheckpointError, Interrupted, StorageError, TurnoutError, UsageError, word
from turnout.models.checkpoint.own import read_json
from turnout.storage import check_seal, digest, load_tensors, read_error, save_tensors, sealed, write_whole
from turnout.train.folder import locked, write_failure

__all__ = ["MemoryShortError", "Part", "Partial", "Say", "enough_memory", "refuse_existing", "unfinished"]

_WHERE = "turnout convert"
# The first file of such a folder, by which it is known: what is converted, and how.
_MARK, _DONE, _RESULT, _KEPT = "turnout-convert.json", "done.json", "result", "kept"
_PIECE = "turnout.piece/1"
Say = Callable[[str], None]
Part = Callable[[str, int, int], None]


class MemoryShortError(UsageError):
    """The memory ran out on the way; with more of it, or a smaller model, the same would work."""


class Pieces:
    """What one step has finished, a safetensors file each: as ``turnout.reshape.resumable`` asks for it.

    Args:
        folder: of the step.
        part: is told how far a stretch of work is.

    Source: none; plain bookkeeping.
    """

    def __init__(self, folder: Path, part: Part) -> None:
        self._folder, self._part, self._names = folder, part, 0

    def name(self, what: str) -> str:
        """The number of the stretch, and its words."""
        self._names += 1
        return f"{self._names:03d}-{re.sub(r'[^a-z0-9]+', '-', what.lower())}"

    def get(self, name: str) -> dict[str, Tensor] | None:
        """The piece, or None.

        Raises:
            CheckpointError: a file that was damaged since it was written.
        """
        path = self._folder / f"{name}.safetensors"
        if not path.is_file():
            return None

        def refuse(problem: str) -> CheckpointError:
            got, fix = f"{path} ({problem})", "remove the file: what it held is worked out again"
            return CheckpointError(word("a piece", got=got, allowed="be as it was written", where=_WHERE, fix=fix))

        metadata, tensors = load_tensors(path, refuse, ("format",))
        if metadata != {"format": _PIECE}:
            raise refuse("no piece of this version")
        return tensors

    def put(self, name: str, piece: Mapping[str, Tensor]) -> None:
        """Writes the file, aside first and then renamed."""
        save_tensors(self._folder / f"{name}.safetensors", piece, {"format": _PIECE})

    def tell(self, what: str, done: int, of: int) -> None:
        """Passes it on."""
        self._part(what, done, of)


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): digest(file) for file in files}


class Partial:
    """The folder of a conversion that is not finished.

    Args:
        folder: ``OUT.part``.
        part: is told how far a stretch of work is.

    Source: none; plain bookkeeping.
    """

    def __init__(self, folder: Path, part: Part) -> None:
        self.folder, self._part = folder, part
        # What is being done, for error.txt.
        self.doing = "begin"

    @property
    def result(self) -> Path:
        """Where the result is written."""
        return self.folder / _RESULT

    @property
    def holds_work(self) -> bool:
        """Whether anything is finished."""
        return self.result.exists() or any((self.folder / _KEPT).rglob("*.safetensors"))

    def pieces(self, name: str) -> Pieces:
        """What is finished of the step of this name."""
        return Pieces(self.folder / _KEPT / name, self._part)

    def written(self) -> dict[str, Any] | None:
        """What ``finish`` was given, where the weights of the result are all written; None before."""
        if not (self.folder / _DONE).is_file():
            return None

        def refuse(problem: str) -> CheckpointError:
            got, fix = f"{self.folder / _DONE} ({problem})", f"remove {self.folder} to begin anew"
            return CheckpointError(word("the result", got=got, allowed="be as it was written", where=_WHERE, fix=fix))

        body = reading.read_json(self.folder / _DONE, refuse=refuse, finite=False)
        check_seal(body, refuse)
        found = _digests(self.result)
        if any(found.get(name) != sha256 for name, sha256 in body["files"].items()):
            raise refuse("the files of the result are others than were written")
        return body["done"]

    def clear(self) -> None:
        """Removes a result that was not finished, and what writing it may have left beside it."""
        for place in (self.result, self.result.with_name(f"{_RESULT}.part")):
            shutil.rmtree(place, ignore_errors=True)

    def finish(self, body: Mapping[str, Any]) -> None:
        """Says that the weights of the result are all written, and what there is to tell of them."""
        write_whole(self.folder / _DONE, json.dumps(sealed({"done": body, "files": _digests(self.result)})) + "\n")


@contextlib.contextmanager
def unfinished(out: Path, settings: Mapping[str, Any], part: Part) -> Iterator[Partial]:
    """The folder to convert in, new or of the same conversion begun before; it ends as ``out``, whole, or not at all.

    What can be gone on with stays when the process is killed, interrupted, out of memory or out of disk, or fails by a
    defect; ``error.txt`` beside it says why. It goes when the input is refused.

    Args:
        out: the final folder; must not exist.
        settings: what the conversion depends on: only one with the same settings goes on.
        part: is told how far a stretch of work is.

    Raises:
        StorageError: ``out`` exists, something else is in the way, or the disk is full.
        UsageError: another conversion was begun in the same place, or another process is converting there.
        Interrupted: the user stopped it.
    """
    refuse_existing(out)
    folder = out.with_name(out.name + ".part")
    _refuse_other(folder, settings)
    place = Partial(folder, part)
    with locked(folder, doing="converting", where=_WHERE):
        try:
            if not (folder / _MARK).is_file():
                write_whole(folder / _MARK, json.dumps({"for": str(out), "settings": settings}, indent=2) + "\n")
            (folder / "error.txt").unlink(missing_ok=True)
            yield place
            refuse_existing(out)
            place.result.rename(out)
        except KeyboardInterrupt:
            raise _stopped(place) from None
        except BaseException as error:
            failed = _failed(place, out, error)
            if failed is error:
                raise
            raise failed from error
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def enough_memory(peak_bytes: int) -> Iterator[None]:
    """Says what there is to do where the memory runs out.

    Args:
        peak_bytes: what was to be held.

    Raises:
        MemoryShortError: it ran out.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "allocate memory" not in str(error):
            raise
        got = f"too little for about {peak_bytes / 1e9:.3g} GB"
        fix = "close other programs, or convert on a machine with more, or with --dtype bfloat16"
        raise MemoryShortError(word("the memory", got=got, allowed="hold two models", where=_WHERE, fix=fix)) from error


def refuse_existing(out: Path) -> None:
    """Refuses to write over anything."""
    if out.exists() or out.is_symlink():
        fix = "name a new folder, or remove this one"
        raise StorageError(word("--out", got=f"{out}, which exists", allowed="be new", where=_WHERE, fix=fix))


def _refuse_other(folder: Path, settings: Mapping[str, Any]) -> None:
    """Refuses a place that holds anything but this very conversion."""
    if not (folder / _MARK).is_file():
        if folder.exists() and (not folder.is_dir() or {file.name for file in folder.iterdir()} - {".lock"}):
            fix = f"move {folder} away, or name another folder"
            raise StorageError(word(str(folder), got="something else", allowed="be free to use", where=_WHERE, fix=fix))
        return
    begun = read_json(folder / _MARK, _WHERE).get("settings")
    begun = begun if isinstance(begun, dict) else {}
    now = json.loads(json.dumps(settings))
    for name in now:
        if begun.get(name) != now[name]:
            got = f"{folder}, a conversion begun with {name} {_shown(begun.get(name))}, not {_shown(now[name])}"
            fix = f"give the old settings to go on, remove {folder} to begin anew, or name another --out"
            raise UsageError(word("--out", got=got, allowed="not hold another conversion", where=_WHERE, fix=fix))


def _stopped(place: Partial) -> BaseException:
    if not place.holds_work:
        shutil.rmtree(place.folder, ignore_errors=True)
        return Interrupted("stopped before anything was finished; nothing was written")
    return Interrupted(f"stopped; what is finished is in {place.folder}, and the same command goes on from there")


def _failed(place: Partial, out: Path, error: BaseException) -> BaseException:
    """The error to raise: the folder stays where the same command may do better another time."""
    if isinstance(error, OSError) and not isinstance(error, TurnoutError):
        error = read_error(error, out, _WHERE)
    refused = isinstance(error, TurnoutError) and not isinstance(error, StorageError | MemoryShortError)
    if refused or not (place.folder / _MARK).is_file():
        shutil.rmtree(place.folder, ignore_errors=True)
        return error
    write_failure(place.folder, error, place.doing, {"command": shlex.join(sys.argv)})
    go_on = f"What is finished is in {place.folder}: the same command goes on from there."
    if isinstance(error, TurnoutError):
        return type(error)(f"{error} {go_on}")
    error.add_note(go_on)
    return error


def _shown(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:79] + "…"
