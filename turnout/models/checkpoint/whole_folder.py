"""A folder that appears whole or not at all, and in whose place nothing of others is removed."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from turnout.errors import StorageError, word
from turnout.storage import read_error

__all__ = ["whole_folder"]


@contextlib.contextmanager
def whole_folder(path: Path, where: str) -> Iterator[Path]:
    """A folder to write in, ``NAME.part``, which takes the name ``path`` if all went well, and is removed if not.

    Args:
        path: the folder; must not exist, or be empty.
        where: the function that was asked, for errors.

    Raises:
        StorageError: there is something in the one or the other place, or the disk is full.

    >>> import tempfile
    >>> place = Path(tempfile.mkdtemp()) / "new"
    >>> with whole_folder(place, "here") as aside:
    ...     _ = (aside / "one").write_text("1")
    >>> [file.name for file in place.iterdir()]
    ['one']

    Source: none; plain bookkeeping.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise _refusal("the folder", path, "be new or empty", where, "choose a new folder")
    aside = path.with_name(path.name + ".part")
    try:
        aside.mkdir(parents=True)
    except FileExistsError as error:
        fix = "remove it, if it is what a stopped process has left, or choose another folder to write to"
        raise _refusal(str(aside), "something that is there already", "be free to write in", where, fix) from error
    except OSError as error:
        raise read_error(error, path, where) from error
    try:  # only what was made here is removed
        yield aside
        if path.exists():
            path.rmdir()
        aside.rename(path)
    except StorageError:
        raise
    except OSError as error:
        raise read_error(error, path, where) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _refusal(what: str, got: object, allowed: str, where: str, fix: str) -> StorageError:
    return StorageError(word(what, got=got, allowed=allowed, where=where, fix=fix))
