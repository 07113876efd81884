"""Files on disk: written aside, flushed, then renamed, so that a half-written file never passes for a whole one."""

import contextlib
import errno
import hashlib
import importlib
import io
import json
import os
import re
import time
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from turnout.errors import StorageError, TurnoutError, word
from turnout.reading import Refuse, check_safetensors, open_regular

__all__ = [
    "cache_folder",
    "check_seal",
    "create",
    "digest",
    "flush",
    "hold",
    "load_tensors",
    "open_own",
    "read_error",
    "save_tensors",
    "sealed",
    "write_whole",
]

# Windows changes the ends of lines in a file that is opened without it, and elsewhere there is no such thing.
_BINARY = getattr(os, "O_BINARY", 0)
# The byte that is locked on Windows, where nobody may read what is locked: far behind all that a file of ours holds.
_FAR = 1 << 30


def cache_folder() -> Path | None:
    """Where this user's measurements and compiled kernels are kept: $TURNOUT_CACHE, or turnout in the user's cache.

    Returns:
        The folder, which need not be there; None where this user has no home.

    >>> cache_folder() is None or cache_folder().is_absolute() or "TURNOUT_CACHE" in os.environ
    True

    Source: the XDG Base Directory Specification, for $XDG_CACHE_HOME.
    """
    own, cache = os.environ.get("TURNOUT_CACHE"), os.environ.get("XDG_CACHE_HOME")
    with contextlib.suppress(RuntimeError):  # a container's user that no list of users has, without HOME
        return Path(own or Path(cache or Path.home() / ".cache") / "turnout")
    return None


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
        with create(aside) as file:
            mode = os.fstat(file.fileno()).st_mode
            file.write(content.encode() if isinstance(content, str) else content if isinstance(content, bytes) else b"")
        if callable(content):
            content(aside)
            # Some libraries make files that nobody else may read.
            aside.chmod(mode)
        flush(aside)
        aside.replace(path)
        flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        system = _system_error(error)
        if system is None:
            raise
        raise read_error(system, path, "write_whole") from error


def create(path: Path) -> BinaryIO:
    """A new file, open for writing, in the place of whatever is there; a link there is removed, not followed.

    Raises:
        OSError: it cannot be made.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, create(Path(folder, "new")) as file:
    ...     file.write(b"bytes")
    5

    Source: none; plain bookkeeping.
    """
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o666), "wb")


def open_own(path: Path) -> BinaryIO:
    """A file of ours to read and add to, made where it is missing; a link in its place is not followed.

    Raises:
        OSError: it cannot be opened.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, open_own(Path(folder, "log")) as file:
    ...     file.write(b"line")
    4

    Source: none; plain bookkeeping.
    """
    no_link = getattr(os, "O_NOFOLLOW", None)  # Windows has none: there a link could still come in between
    if no_link is None and path.is_symlink():
        raise FileExistsError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | _BINARY | (no_link or 0)
    return os.fdopen(os.open(path, flags, 0o666), "a+b")


def hold(file: BinaryIO, *, wait: bool = False) -> bool:
    """Locks an open file for this process, until the file is closed or the process ends, however it does.

    Args:
        file: open for writing. What it holds can be read by others, locked or not.
        wait: until whoever has it lets it go.

    Returns:
        Whether it is locked now; without ``wait``, false where another process has it. Where this Python has no locks
        at all it says so in a warning, and gives true.

    >>> import tempfile
    >>> with tempfile.TemporaryFile() as file:
    ...     hold(file)
    True

    Source: flock(2), and _locking of Windows.
    """
    try:
        import fcntl
    except ImportError:
        return _hold_on_windows(file, wait)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def _hold_on_windows(file: BinaryIO, wait: bool) -> bool:
    try:
        windows: Any = importlib.import_module("msvcrt")
    except ImportError:
        warnings.warn(f"this Python has no locks: nothing keeps other processes out of {file.name}", stacklevel=3)
        return True
    while True:
        os.lseek(file.fileno(), _FAR, os.SEEK_SET)
        try:
            windows.locking(file.fileno(), windows.LK_NBLCK, 1)
            return True
        except OSError:
            if not wait:
                return False
        finally:
            os.lseek(file.fileno(), 0, os.SEEK_SET)
        time.sleep(0.1)


def _system_error(error: BaseException) -> OSError | None:
    """The operating system's error in this one. Rust libraries (safetensors) tell of it in their text only."""
    if isinstance(error, OSError):
        return error
    found = re.search(r"\(os error (\d+)\)", str(error)) if isinstance(error, Exception) else None
    return OSError(int(found[1]), os.strerror(int(found[1]))) if found else None


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk. Windows opens no folders, and keeps their names.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     flush(Path(folder))

    Source: fsync(2).
    """
    if (folder := path.is_dir()) and not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)  # Windows flushes only what may be written
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
        errno.EFBIG: ("be where files of this size are allowed", "raise ulimit -f, or write to another disk"),
        errno.EACCES: ("be accessible to this user", "change its permissions, or choose another folder"),
        errno.EPERM: ("be accessible to this user", "change its permissions, or choose another folder"),
        errno.EROFS: ("be on a writable disk", "choose another folder"),
        errno.ENOENT: ("exist", "check the spelling of the path"),
        errno.EEXIST: ("be a folder", "it is a file: choose another path"),
        errno.ENOTDIR: ("lie in a folder", "one of its parents is a file: choose another path"),
        errno.ELOOP: ("be a file, not a link", "remove the link: what it leads to is not written"),
        errno.EISDIR: ("be a file", "it is a folder: choose another path"),
    }
    allowed, fix = fixes.get(error.errno or 0, ("be readable and writable", "see the system's message"))
    return StorageError(
        word("the path", got=f"{path} ({error.strerror or error})", allowed=allowed, where=where, fix=fix)
    )


def sealed(body: Mapping[str, object]) -> dict[str, object]:
    """The JSON object with the SHA-256 of its content beside it. That is no signature: it tells damage, not malice.

    >>> sealed({"a": 1})["sha256"][:8]
    'f9d86028'

    Source: none; plain bookkeeping.
    """
    return {**body, "sha256": _seal(body)}


def check_seal(body: Mapping[str, object], refuse: Refuse, names: Iterable[str] | None = None) -> None:
    """Refuses an object that was altered since it was sealed.

    Args:
        body: what was read.
        refuse: words what is wrong.
        names: what it may hold where it has no seal, as folders of earlier versions have none; None where it must.

    Raises:
        TurnoutError: what ``refuse`` words.

    >>> check_seal(sealed({"a": 1}), StorageError)

    Source: none; plain bookkeeping.
    """
    rest = {name: item for name, item in body.items() if name != "sha256"}
    if "sha256" not in body and names is not None:
        if strange := sorted(set(rest) - set(names)):
            raise refuse(f"no sha256, and the key {strange[0]!r:.80}, which nobody wrote there")
    elif body.get("sha256") != _seal(rest):
        raise refuse("its content is not what its sha256 says; whoever changed it on purpose may remove that key")


def _seal(body: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A safetensors file of our own, with the SHA-256 of all that it holds in its metadata.

    Args:
        path: the file.
        tensors: by name.
        metadata: what it says of itself.

    Raises:
        StorageError: it cannot be written.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_tensors(Path(folder, "a"), {"one": torch.ones(1)}, {"format": "b"})
    ...     load_tensors(Path(folder, "a"), StorageError, {"format"})
    ({'format': 'b'}, {'one': tensor([1.])})

    Source: the file format of safetensors.
    """
    from safetensors.torch import save_file

    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    whole = {**metadata, "sha256": _tensor_seal(kept, metadata)}
    write_whole(path, lambda aside: save_file(kept, aside, metadata=whole))


def load_tensors(
    path: Path, refuse: Refuse, names: Iterable[str], *, any_link: bool = False
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of a file that ``save_tensors`` wrote, all as they were then.

    Args:
        path: the file.
        refuse: words what is wrong.
        names: of the metadata that it may have. A file of earlier versions has no hash, and is read without.
        any_link: follow links wherever they lead: for a file that the user named.

    Raises:
        TurnoutError: not a whole safetensors file, or one that was altered; what ``refuse`` words.

    >>> load_tensors(Path("no/such/file"), StorageError, ())
    Traceback (most recent call last):
    turnout.errors.StorageError: [Errno 2] No such file or directory: 'no/such/file'

    Source: the file format of safetensors.
    """
    from safetensors import SafetensorError, safe_open

    try:
        check_safetensors(path, refuse, any_link=any_link)
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        if isinstance(error, TurnoutError):
            raise
        raise refuse(str(error)) from error
    sha256 = metadata.pop("sha256", None)
    if sha256 is None and (strange := sorted(set(metadata) - set(names))):
        raise refuse(f"no sha256 in its metadata, and the key {strange[0]!r:.80}, which nobody wrote there")
    if sha256 not in (None, _tensor_seal(tensors, metadata)):
        raise refuse("its content is not what its sha256 says")
    return metadata, tensors


def _tensor_seal(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        total.update(f"\0{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        if tensor.numel():
            total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


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
        return hashlib.file_digest(typing.cast(io.BufferedReader, file), "sha256").hexdigest()
