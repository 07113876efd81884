"""Compiled kernels on disk: made once for a processor, read by every later process.

They lie in $TURNOUT_CACHE or ~/.cache/turnout, under ``kernels``, by numba's version and the source they come from.
numba keeps one index for all signatures of a function, which two processes that start at once can write so that it
names the other's code; so each signature, on each processor, has a folder of its own, where all write the same.
What numba keeps it unpickles: a folder that others can write to is neither read nor written.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import stat
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from turnout import __version__
from turnout.storage import cache_folder

__all__ = ["keep", "kernels_path"]


def kernels_path() -> Path | None:
    """The folder that compiled kernels are kept in; None where this user has no home.

    >>> kernels_path() is None or kernels_path().name
    'kernels'

    Source: none; plain bookkeeping.
    """
    folder = cache_folder()
    return None if folder is None else folder / "kernels"


def keep(dispatcher: Any, files: Iterable[str], threaded: bool) -> None:
    """From now on what this dispatcher compiles is kept on disk, where a folder for it can be written.

    Args:
        dispatcher: numba's.
        files: the sources of all that it is made of, those of this package apart; numba itself looks at one alone.
        threaded: whether it is for several threads.
    """
    path = kernels_path()
    if path is not None:
        version = importlib.import_module("numba").__version__
        source = __version__ + "".join(map(_text, (*_ours(), *sorted(files))))
        digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        dispatcher._cache = _Saved(dispatcher.py_func, path / f"{version}-{digest}-{int(threaded)}")


@functools.cache
def _ours() -> tuple[str, ...]:
    """All files of kernels: what writes a kernel's code takes parts and numbers from others that it does not name."""
    return tuple(sorted(map(str, Path(__file__).parent.glob("*.py"))))


@functools.cache
def _text(file: str) -> str:
    # A kernel that was typed in has no file, and numba keeps nothing of it.
    return Path(file).read_text(encoding="utf-8") if Path(file).is_file() else file


@functools.cache
def _say(folder: Path) -> None:
    if sys.stderr.isatty():
        text = "turnout compiles its kernels for this processor, once, which takes up to a minute"
        text += f"; they are kept in {folder.parent}"
        print(text, file=sys.stderr, flush=True)


@functools.cache
def _own(folder: Path) -> bool:
    """Whether nobody but this user can have put something there, or another folder in its place."""
    if not hasattr(os, "geteuid"):
        return True
    here, above = folder.stat(), folder.parent.stat()
    replaced = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
    if here.st_uid == os.geteuid() and not here.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not replaced:
        return True
    fix = f"chmod go-w {folder}, or set TURNOUT_CACHE to a folder of your own"
    text = f"compiled kernels are not kept: others can write to {folder}. Nearest fix: {fix}."
    warnings.warn(text, UserWarning, stacklevel=2)
    return False


class _Saved:
    """What numba asks for kept code; nothing that goes wrong on disk is a reason not to compile."""

    def __init__(self, function: Any, folder: Path) -> None:
        self._function, self._folder = function, folder

    @property
    def cache_path(self) -> str:
        return str(self._folder)

    def enable(self) -> None:
        """It always is."""

    disable = flush = enable

    def _files(self, signature: Any, codegen: Any) -> Any:
        """Numba's own files, in the folder of this signature and processor; None where they cannot lie there."""
        key = hashlib.sha256(repr((signature, codegen.magic_tuple())).encode()).hexdigest()[:24]
        folder = self._folder / f"{self._function.__name__}-{key}"
        config = importlib.import_module("numba").config
        before = config.CACHE_DIR
        try:
            parts = (self._folder.parent, self._folder, folder)
            for part in parts:
                part.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not all(map(_own, parts)):
                return None
            config.CACHE_DIR = str(folder)
            files = importlib.import_module("numba.core.caching").FunctionCache(self._function)
        except Exception:  # no such room, or a function without a file
            return None
        finally:
            config.CACHE_DIR = before
        return files if Path(files.cache_path).is_relative_to(folder) else None

    def load_overload(self, signature: Any, context: Any) -> Any:
        """The compiled code, or None: what cannot be read is made again."""
        context.refresh()
        files = self._files(signature, context.codegen())
        with contextlib.suppress(Exception):
            if files is not None and (found := files.load_overload(signature, context)) is not None:
                return found
        _say(self._folder)
        return None

    def save_overload(self, signature: Any, made: Any) -> None:
        """Keeps it if that can be."""
        files = self._files(signature, made.codegen)
        with contextlib.suppress(Exception):
            if files is not None:
                files.save_overload(signature, made)
