"""Files on disk: written aside, flushed, then renamed, so that a half-written file never passes for a whole one."""

import contextlib
import errno
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

from turnout.errors import StorageError, word
from turnout.reading import open_regular

__all__ = ["digest", "read_error", "write_whole"]


def write_whole(path: str | Path, content: str | bytes | Callable[[Path], None]) -> None:
    """Writes a file so that ``path`` holds either what it held before or all of ``content``.

    The content goes to a ``.part`` file beside it, is flushed to the disk, and takes the name in one step.

    Args:
        path: the file; its folder is made when missing.
        content: text (written as UTF-8), bytes, or a function that writes the file whose path it is given.

    Raises:
        StorageError: the disk is full, the folder is not writable, or the path is not a file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder, "new", "note.txt"), "all of it")
    ...     Path(folder, "new", "note.txt").read_text(encoding="utf-8")
    'all of it'

    Source: none; plain bookkeeping.
    """
    path = Path(path)
    aside = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            aside.write_text(content, encoding="utf-8")
        elif isinstance(content, bytes):
            aside.write_bytes(content)
        else:
            aside.touch()
            mode = aside.stat().st_mode
            content(aside)
            # Some libraries make files that nobody else may read.
            aside.chmod(mode)
        _flush(aside)
        aside.replace(path)
        _flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        system = _system_error(error)
        if system is None:
            raise
        raise read_error(system, path, "write_whole") from error


def _system_error(error: BaseException) -> OSError | None:
    """The operating system's error in this one. Rust libraries (safetensors) tell of it in their text only."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_error(error: OSError, path: str | Path, where: str) -> StorageError:
    """The StorageError that says what an operating-system error means for this path, and what to do.

    >>> print(read_error(OSError(errno.ENOENT, "not found"), "notes.txt", "the example"))
    the path must exist in the example; got notes.txt (not found). Nearest fix: check the spelling of the path.

    Source: none; plain bookkeeping.
    """
    fixes = {
        errno.ENOSPC: ("be on a disk with room", "free some space, or write to another disk; nothing saved was lost"),
        errno.EDQUOT: ("be within the disk quota", "free some space, or write elsewhere; nothing saved was lost"),
        errno.EACCES: ("be accessible to this user", "change its permissions, or choose another folder"),
        errno.EPERM: ("be accessible to this user", "change its permissions, or choose another folder"),
        errno.EROFS: ("be on a writable disk", "choose another folder"),
        errno.ENOENT: ("exist", "check the spelling of the path"),
        errno.EEXIST: ("be a folder", "it is a file: choose another path"),
        errno.ENOTDIR: ("lie in a folder", "one of its parents is a file: choose another path"),
        errno.EISDIR: ("be a file", "it is a folder: choose another path"),
    }
    allowed, fix = fixes.get(error.errno or 0, ("be readable and writable", "see the system's message"))
    return StorageError(
        word("the path", got=f"{path} ({error.strerror or error})", allowed=allowed, where=where, fix=fix)
    )


def digest(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, as 64 hexadecimal digits; reads in pieces, so any size is fine.

    Raises:
        CheckpointError: a device, a pipe or a folder, which have no end or no bytes.
        OSError: it cannot be read.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     digest(file.name)[:8]
    'e3b0c442'

    Source: none; plain bookkeeping.
    """
    with open_regular(path, any_link=True) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
