"""Text that every Python carries: the library's source, the manual and the C headers."""

import hashlib
import os
import sys
import sysconfig
from collections.abc import Callable, Mapping
from pathlib import Path

from turnout.errors import DataError, UsageError, word
from turnout.train.data.document import Document, NotTextError

__all__ = ["python_text"]

# Not the library itself, or (pydoc_data) a copy of the manual.
_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "pydoc_data", "__pycache__"}


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def python_text(
    *, limit_bytes: int | None = None, say: Callable[[str], object] = _to_stderr
) -> Mapping[str, list[Document]]:
    """Three domains of real text, from this interpreter's own files: ``library``, ``manual`` and ``headers``.

    ``library`` is the standard library's ``.py`` files without tests, installed packages and IDLE; ``manual`` the
    topics of ``pydoc_data.topics``, one document each; ``headers`` the ``.h`` files of the interpreter. Which files
    there are depends on the Python that runs this; one that is missing is said to be, and left out.

    Args:
        limit_bytes: at most this much of each domain, in whole documents chosen by content hash; the library has
            about 12 MB, the headers 1 MB, the manual half of one.
        say: told what is missing; default a line on stderr.

    Returns:
        Domain -> documents, for ``prepare``.

    Raises:
        DataError: this Python carries none of the three.

    >>> sorted(python_text(limit_bytes=50_000, say=lambda text: None))[-1] in ("headers", "library", "manual")
    True

    Source: none; van Rossum et al., CPython, under the licence of the Python Software Foundation.
    """
    if limit_bytes is not None and limit_bytes < 1:
        raise UsageError(
            word(
                "limit_bytes",
                got=limit_bytes,
                allowed="be 1 or more, or None",
                where="python_text",
                fix="pass limit_bytes=1_000_000",
            )
        )
    found: dict[str, list[Document]] = {}
    for name, read in (("library", _library), ("manual", _manual), ("headers", _headers)):
        documents, place = read()
        if documents and limit_bytes is not None:
            documents = _within(documents, limit_bytes)
        if documents:
            found[name] = documents
        else:
            say(f"this Python carries no {name} ({place}): going on without that domain")
    if not found:
        raise DataError(
            word(
                "this Python",
                got=sys.prefix,
                allowed="carry its library, manual or headers as files",
                where="python_text",
                fix="pass text of your own with --data",
            )
        )
    return found


def _library() -> tuple[list[Document], str]:
    folder = Path(sysconfig.get_path("stdlib"))
    return _files(folder, ".py"), f"no .py files in {folder}"


def _headers() -> tuple[list[Document], str]:
    folder = Path(sysconfig.get_path("include"))
    return _files(folder, ".h"), f"no .h files in {folder}; is the python3-dev package missing?"


def _manual() -> tuple[list[Document], str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return [], "no module pydoc_data.topics"
    return [
        Document(f"topic {name}", text) for name, text in sorted(topics.items()) if text
    ], "pydoc_data.topics is empty"


def _files(folder: Path, suffix: str) -> list[Document]:
    paths = []
    for inside, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _LEFT_OUT]
        paths += [Path(inside, name) for name in names if name.endswith(suffix)]
    names = {path.relative_to(folder).as_posix(): path for path in paths if path.stat().st_size}
    return [Document(name, names[name], optional=True) for name in sorted(names)]


def _within(documents: list[Document], limit: int) -> list[Document]:
    """Whole documents that fit in the limit: in the order of their hashes, each that still has room; then by place."""
    keyed = []
    for place, document in enumerate(documents):
        try:
            content = b"".join(document.pieces())
        except NotTextError:
            continue  # prepare would leave it out too
        keyed.append((hashlib.sha256(content).digest()[8:16], place, len(content)))
    taken = []
    for _, place, size in sorted(keyed):
        if size <= limit:
            taken.append(place)
            limit -= size
    return [documents[place] for place in sorted(taken)]
