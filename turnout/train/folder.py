"""The output folder of one run: who may write in it, what it already holds, and what is left there on failure."""

import contextlib
import datetime
import fcntl
import os
import platform
import shlex
import sys
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from turnout import __version__
from turnout.errors import CheckpointError, StorageError, UsageError, word
from turnout.reading import read_json
from turnout.storage import open_own, read_error, write_whole

__all__ = ["locked", "read_run_json", "refuse_foreign", "refuse_missing_run", "refuse_other_run", "write_failure"]

_TRACES = ("run.json", "metrics.jsonl", "checkpoints")
# What a finished run writes over, and what says that a folder is a model, adapters or a conversion of somebody's.
_WRITTEN = ("model", "trace", "result.json", "routes.json", "report.html")
_MARKS = ("config.json", "adapter_config.json", "adapters.json", "*.safetensors", "*.safetensors.index.json", "*.bin")


@contextlib.contextmanager
def locked(out: Path, *, doing: str = "training", where: str = "turnout.train") -> Iterator[None]:
    """Holds the folder for this process; the lock ends with the process, however that ends.

    Args:
        out: the folder; made when missing.
        doing: what another process would be at.
        where: who asks.

    Raises:
        UsageError: another process is at work in this folder.
        StorageError: the folder cannot be written.
    """
    path = out / ".lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = open_own(path)
    except OSError as error:
        raise read_error(error, out, where) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(32).decode(errors="replace").strip() or "unknown"
            raise UsageError(
                word(
                    "the output folder",
                    got=f"{out}, in which process {holder} is {doing}",
                    allowed="be free",
                    where=where,
                    fix="wait for that process or stop it (it saves first), or write to another --out",
                )
            ) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n".encode())
        file.flush()
        yield


def refuse_missing_run(out: Path, wanted: str | None) -> None:
    """Stops a resume in a folder that holds no run, or a model that was made of one: it would begin at random.

    Raises:
        UsageError: there is nothing to go on with.
    """
    if wanted is not None and "conversion" in read_run_json(out) and not (out / "checkpoints").exists():
        got, place = f"{out}, a converted model, which no run has trained", shlex.quote(str(out))
        fix = f"train it on in a folder of its own: turnout train --from {place} --out NEW"
        allowed = "name a folder that holds a run"
        raise UsageError(word("resume", got=got, allowed=allowed, where="turnout.train", fix=fix))
    if wanted is not None and not any((out / name).exists() for name in _TRACES):
        raise UsageError(
            word(
                "resume",
                got=str(out),
                allowed="name a folder that holds a run",
                where="turnout.train",
                fix="leave out --resume to start a run there, or name the run's own folder",
            )
        )


def refuse_other_run(out: Path, begun: Mapping[str, Any] | None = None) -> None:
    """Stops a new run from writing over one that is there.

    Args:
        out: the output folder.
        begun: what the new run's run.json will hold. A folder with a run.json that says nothing else, and no trace
            of training, holds this very run, stopped before its first step.

    Raises:
        UsageError: the folder holds a run; says which, and how far it is.
    """
    found = [name for name in _TRACES if (out / name).exists()]
    if not found:
        return
    body = read_run_json(out)
    if found == ["run.json"] and begun and body and all(begun.get(name) == body[name] for name in body):
        return
    about = f"recipe {body['recipe']}, " if "recipe" in body else ""
    steps = sorted(path.name for path in (out / "checkpoints").glob("step-*") if path.name[5:].isdigit())
    about += f"last checkpoint {steps[-1]}" if steps else f"{', '.join(found)}, no checkpoint yet"
    raise UsageError(
        word(
            "the output folder",
            got=f"{out}, which holds a run ({about})",
            allowed="not hold another run",
            where="turnout.train",
            fix="go on with it with --resume (resume=True), or write to another --out",
        )
    )


def refuse_foreign(out: Path) -> None:
    """Stops a new run in a folder that holds something of somebody else's: it would be written over, or mixed with it.

    A folder with prepared tokens, a log or other files that no run writes is taken.

    Args:
        out: the output folder; it need not be there.

    Raises:
        UsageError: the folder holds a model, adapters, or what the end of a run writes over.
    """
    found = sorted({path.name for name in (*_WRITTEN, *_MARKS) for path in out.glob(name)})
    if found:
        raise UsageError(
            word(
                "the output folder",
                got=f"{out}, which holds {', '.join(found[:4])}{' and more' if found[4:] else ''}",
                allowed="be new",
                where="turnout.train",
                fix=f"write to another --out, such as {out / 'run'}",
            )
        )


def read_run_json(out: Path) -> dict[str, Any]:
    """What is in run.json; empty when there is none, or none that can be read."""
    try:
        return read_json(out / "run.json", any_link=True)
    except (OSError, CheckpointError):
        return {}


def write_failure(out: Path, error: BaseException, step: int | str, run_json: Mapping[str, Any]) -> None:
    """Leaves error.txt: time, command, step, versions, traceback. On a full disk, adds a note to the error instead."""
    lines = [
        f"time     {datetime.datetime.now().astimezone().isoformat(timespec='seconds')}",
        f"command  {run_json.get('command') or shlex.join(sys.argv)}",
        f"step     {step}",
        f"versions turnout {__version__}, torch {torch.__version__}, python {platform.python_version()}, "
        f"{platform.system()} {platform.machine()}",
        "",
        *traceback.format_exception(error),
    ]
    try:
        write_whole(out / "error.txt", "\n".join(lines))
    except StorageError as second:
        error.add_note(f"error.txt could not be written either: {second}")
