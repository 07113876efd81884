"""The documents of a source: files, folders, rows of jsonl and parquet, data sets, or texts in memory."""

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from turnout.errors import DataError, UsageError, word
from turnout.reading import open_regular
from turnout.storage import read_error
from turnout.train.data import rows
from turnout.train.data.document import Document

__all__ = ["Source", "list_files", "listed", "read_documents"]

_WHERE = "turnout.train.data"
# Folders that hold no text of the user's own.
_PASSED_OVER = {"__pycache__", "node_modules"}
# How much of a file is looked at to tell rows from text.
_LOOK = 1 << 16

Source: TypeAlias = "str | Path | Document | Sequence[Source] | Any"


def read_documents(source: Source, *, field: str = "text", left_out: rows.LeftOut | None = None) -> Iterator[Document]:
    """The documents of a source, in an order that depends on nothing but names and contents.

    A folder is read recursively, sorted by path; hidden files, ``__pycache__`` and links to folders are passed over.
    ``.jsonl`` and ``.ndjson`` give one document a line, ``.parquet`` and data sets one a row, any other file one
    document; but a ``.json`` file that is named itself and is one list of rows is refused. A row whose text is null is
    an empty document, in every format.

    Args:
        source: a path, a Document, a ``datasets.Dataset``, ``"hf:owner/name[:configuration[:split]]"``, or a list.
        field: which field of a row holds the text.
        left_out: called with a reason and the row's file and line for each row that cannot be read (broken JSON, no
            such field, something that is not text, half a surrogate pair); it is passed over then. None refuses it.

    Returns:
        The documents; the text of files is not read yet.

    Raises:
        UsageError: a path that does not exist (the nearest is named), or something that is no source.
        DataError: an empty file, a row that cannot be read, or one JSON list of rows.
        StorageError: a folder or file without permission.
        MissingExtraError: parquet or data sets without the library that reads them.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> _ = (folder / "b.txt").write_text("two"), (folder / "a.jsonl").write_text('{"text": "one"}')
    >>> [Path(document.name).name for document in read_documents(folder)]
    ['a.jsonl:1', 'b.txt']

    Source: none; plain bookkeeping.
    """
    if isinstance(source, Document):
        yield source
    elif isinstance(source, str | Path) and str(source).startswith("hf:"):
        yield from rows.data_set(rows.load(str(source)), str(source), field, left_out)
    elif isinstance(source, str | Path):
        for path, optional in list_files(source):
            suffix = path.suffix.lower()
            if suffix in (".jsonl", ".ndjson"):
                yield from rows.jsonl(path, field, left_out)
            elif suffix == ".parquet":
                yield from rows.parquet(path, field, left_out)
            else:
                if suffix == ".json" and not optional:
                    _refuse_rows(path, field)
                yield Document(str(path), path, optional)
    elif rows.is_data_set(source):
        yield from rows.data_set(source, "the data set", field, left_out)
    else:
        for part in listed(source):
            yield from read_documents(part, field=field, left_out=left_out)


def _refuse_rows(path: Path, field: str) -> None:
    """Refuses a .json file, named by itself, whose whole is a list of rows: as text it would be braces and quotes."""
    with open_regular(path, refuse=DataError, any_link=True) as file:
        start = file.read(_LOOK)
    if re.match(rb"(?:\xef\xbb\xbf)?\s{0,99}\[\s{0,999}\{", start) and f'"{field}"'.encode() in start:
        got, allowed = f"{path} (one JSON list of rows)", "be rows of jsonl, or text"
        fix = "write each row on a line of its own, in a .jsonl file; or name it .txt if it is meant as text"
        raise DataError(word("the data", got=got, allowed=allowed, where=_WHERE, fix=fix))


def listed(source: Any) -> Iterable[Any]:
    """The parts of a list of sources.

    Raises:
        UsageError: it is no list, or one that can be gone through only once; preparation reads more than once.

    Source: none; plain bookkeeping.
    """
    if isinstance(source, Sequence) and not isinstance(source, bytes):
        return source
    raise UsageError(
        word(
            "a source",
            got=type(source).__name__,
            allowed="be a path, a Document, a datasets.Dataset, an 'hf:' name, or a list of these",
            where=_WHERE,
            fix="wrap texts as Document(name, text), and generators as list(...)",
        )
    )


def list_files(path: str | Path) -> list[tuple[Path, bool]]:
    """The file itself, or the files below the folder, sorted; the flag says that it was found, not named.

    Raises:
        UsageError: there is no such path.
        DataError: the file is empty, or the folder holds no file.
        StorageError: a folder without permission.

    >>> list_files("/dev/nulll")
    Traceback (most recent call last):
    turnout.errors.UsageError: the data path must exist in turnout.train.data; got /dev/nulll. Nearest fix: ...

    Source: none; plain bookkeeping.
    """
    path = Path(path)
    try:
        if path.is_dir():
            found = [(file, True) for file in _walk(path)]
            problem, fix = "a folder without files", "put text files there, or name another folder"
        elif path.exists():
            found = [(path, False)] if path.stat().st_size or not path.is_file() else []
            problem, fix = "an empty file", "write text into it, or name another file"
        else:
            raise _missing(path)
    except OSError as error:
        raise read_error(error, error.filename or path, _WHERE) from error
    if not found:
        raise DataError(word("the data", got=f"{path} ({problem})", allowed="hold text", where=_WHERE, fix=fix))
    return found


def _walk(folder: Path) -> Iterator[Path]:
    with os.scandir(folder) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    for entry in inside:
        if entry.name.startswith(".") or entry.name in _PASSED_OVER:
            continue
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path))
        elif entry.is_file():
            yield Path(entry.path)


def _missing(path: Path) -> UsageError:
    """The error for a path that is not there, with the nearest name in the nearest folder that is."""
    folder, lost = path.parent, path.name
    while not folder.is_dir() and folder != folder.parent:
        folder, lost = folder.parent, folder.name
    names = [entry.name for entry in os.scandir(folder)] if folder.is_dir() else []
    close = difflib.get_close_matches(lost, names, n=1, cutoff=0.5)
    fix = (
        f"pass {folder / close[0]}, which is there"
        if close
        else f"{folder.resolve()} has no {lost!r}: check the spelling"
    )
    return UsageError(word("the data path", got=str(path), allowed="exist", where=_WHERE, fix=fix))
