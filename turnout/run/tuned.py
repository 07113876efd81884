"""The tuning in force: measured on this machine if it was calibrated, else what is shipped for its processor."""

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from turnout.errors import CheckpointError, StorageError, TurnoutError, word
from turnout.reading import check_fields, read_json
from turnout.run.shipped import shipped
from turnout.storage import cache_folder
from turnout.types.processor import processor
from turnout.types.tuning import Tuning

__all__ = ["as_tuned", "forget", "kept", "tuning", "tuning_path"]

_HERE = threading.local()
_TIMED = {"sort", "grouped", "kernels"}
_FILE = "executors.json"
_FIX = "remove it, or measure again with turnout doctor --calibrate"


def tuning() -> Tuning:
    """What the executors of this thread choose by.

    Read once a process for each number of torch's threads, so that a calibration beside a training does not change it.

    >>> tuning().threads == torch.get_num_threads()
    True

    Source: none; plain bookkeeping.
    """
    taken = getattr(_HERE, "taken", None)
    if taken is not None:
        return taken
    return _read(os.environ.get("TURNOUT_CACHE"), os.environ.get("XDG_CACHE_HOME"), torch.get_num_threads())


@contextlib.contextmanager
def as_tuned(taken: Tuning) -> Iterator[None]:
    """Inside, the executors of this thread choose by this tuning: to measure it, or to repeat what another chose."""
    before = getattr(_HERE, "taken", None)
    _HERE.taken = taken
    try:
        yield
    finally:
        _HERE.taken = before


def tuning_path() -> Path:
    """Where ``turnout.run.calibrate`` keeps what it measured: in $TURNOUT_CACHE, or ~/.cache/turnout.

    Raises:
        StorageError: neither is set, and this user has no home.
    """
    folder = cache_folder()
    if folder is None:
        fix = "set TURNOUT_CACHE to a folder that can be written"
        where = "turnout.run.calibrate"
        raise StorageError(word("the cache", got="a user without a home", allowed="have a place", where=where, fix=fix))
    return folder / _FILE


@functools.cache
def _read(own: str | None, cache: str | None, threads: int) -> Tuning:
    """What is wrong with the file, or that it holds nothing for here, is said once: a cache is no reason not to run."""
    folder, usual = cache_folder(), shipped(processor(), threads)
    path = None if folder is None else folder / _FILE
    try:
        found = {} if path is None else kept(path)
    except (OSError, TurnoutError) as error:
        text = f"{path} is ignored, and {usual.origin} choices of kernels taken: {error}. Nearest fix: {_FIX}."
        warnings.warn(text, UserWarning, stacklevel=3)
        return usual
    if found and _key(usual) not in found:
        others = "; ".join(f"{who}, {count} threads, torch {version}" for who, version, count in found)
        text = (
            f"{path} is ignored and {usual.origin} choices of kernels taken: what was measured on {others} is in it; "
            f"this is {usual.processor}, {threads} threads, torch {usual.torch}. "
            "Nearest fix: turnout doctor --calibrate."
        )
        warnings.warn(text, UserWarning, stacklevel=3)
    return found.get(_key(usual), usual)


def forget() -> None:
    """The file is read again when it is next asked for."""
    _read.cache_clear()


def _key(one: Tuning) -> tuple[str, str, int]:
    return one.processor, one.torch, one.threads


def kept(path: Path) -> dict[tuple[str, str, int], Tuning]:
    """The tunings that a file holds, by processor, version of torch and threads; none where there is no file.

    Raises:
        TurnoutError: it is not such a file.
        OSError: it cannot be read.
    """
    try:
        body: dict[str, Any] = read_json(path, refuse=CheckpointError, any_link=True)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    check_fields(body, {"tunings": list[dict[str, Any]]}, CheckpointError)
    tunings = [Tuning.from_json_dict(one) for one in body["tunings"]]
    if strange := {name for one in tunings for costs in one.seconds.values() for name in costs} - _TIMED:
        raise CheckpointError(f"there is no executor {min(strange)!r}")
    return {_key(one): one for one in tunings}
