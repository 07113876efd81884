"""Rows with a text field: jsonl line by line, parquet and data sets batch by batch."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from turnout.errors import DataError, MissingExtraError, UsageError, nearest, word
from turnout.reading import parse_json, read_lines
from turnout.storage import read_error
from turnout.train.data.document import Document

_WHERE = "turnout.train.data"
_ROWS = 256
_BUFFER = 1 << 20
_BOM = b"\xef\xbb\xbf"

# Told of what is left out: the reason, and the row by its file and line.
LeftOut = Callable[[str, str], object]


def jsonl(path: Path, field: str, left_out: LeftOut | None = None) -> Iterator[Document]:
    """One document a line, an empty one where the text is null; blank lines are passed over.

    Args:
        path: the file.
        field: which field holds the text.
        left_out: told of each line that cannot be read, which is then passed over; None refuses it.

    Raises:
        DataError: a line that is not a JSON object with the field as text; says which line.
        StorageError: the file cannot be read.

    Source: none; the format of jsonlines.org.
    """

    def too_long(problem: str) -> DataError:
        fix = "cut it into several rows"
        return DataError(word("the data", got=f"{path} ({problem})", allowed="be jsonl", where=_WHERE, fix=fix))

    try:
        for number, whole in enumerate(read_lines(path, refuse=too_long), 1):
            line = whole.removeprefix(_BOM) if number == 1 else whole
            if line.strip():
                yield from _document(_line(line, field), f"{path}:{number}", field, left_out)
    except OSError as error:
        raise read_error(error, path, _WHERE) from error


def _line(line: bytes, field: str) -> object:
    """The text of a line, or what is wrong with it."""
    try:
        # Other fields may hold whatever Python writes, NaN too.
        row = parse_json(line.decode(), _Refused, finite=False)
    except UnicodeDecodeError as error:
        return _Bad(f"byte {error.start} of it is not UTF-8")
    except _Refused as error:
        return _Bad(str(error))
    if field in row:
        return row[field]
    texts = [name for name, value in row.items() if isinstance(value, str)]
    return _Bad(f"no field {field!r}; fields: {_few(row)}", field=texts[0] if texts else None)


class _Refused(DataError):
    """What is wrong with a line; caught here."""


@dataclasses.dataclass(frozen=True)
class _Bad:
    """A row that cannot be read: why, and the field that may have been meant."""

    why: str
    field: str | None = None


def _document(text: object, name: str, field: str, left_out: LeftOut | None) -> Iterator[Document]:
    """The document of a row, an empty one where the text is null; nothing, or an error, where it cannot be read.

    All formats come through here, so that the same rows mean the same in each.
    """
    if text is None:
        yield Document(name, "")
        return
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            text = _Bad(f"half a surrogate pair at character {error.start}")
        else:
            yield Document(name, text)
            return
    bad = text if isinstance(text, _Bad) else _Bad(f"its field {field!r} holds {_kind(text)}")
    if left_out is not None:
        left_out("rows that cannot be read as text", f"{name} ({bad.why})")
        return
    fix = "repair or remove the row, or leave such rows out with bad='skip'"
    if bad.field is not None:
        fix = f"pass field={bad.field!r} if that holds the text, or {fix}"
    raise DataError(
        word("a row", got=f"{name} ({bad.why})", allowed=f"hold its text in {field!r}", where=_WHERE, fix=fix)
    )


def _kind(value: object) -> str:
    """What stands where text should, in words."""
    if isinstance(value, dict):
        return f"an object with {_few(value)}; fields inside fields are not looked for"
    if isinstance(value, bool | int | float):
        return f"the number {value!r:.20}" if not isinstance(value, bool) else f"{value!r}"
    return f"a {type(value).__name__}"


def _few(names: Iterable[object]) -> str:
    shown = [str(name)[:40] for name in names]
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "none"


def parquet(path: Path, field: str, left_out: LeftOut | None = None) -> Iterator[Document]:
    """One document a row, an empty one where the text is null.

    Args:
        path: the file.
        field: which column holds the text.
        left_out: told of each row that cannot be read, which is then passed over; None refuses it.

    Raises:
        MissingExtraError: pyarrow is not installed.
        DataError: the file is not parquet, or has no such text column.
        StorageError: the file cannot be read.

    Source: none; the format of Apache Parquet.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _missing_extra(str(path), "parquet", "pyarrow") from error
    try:
        # With a buffer a column is streamed; without one, a row group of any size is read whole.
        with pyarrow.parquet.ParquetFile(path, buffer_size=_BUFFER) as file:
            names = file.schema_arrow.names
            _check_column(field, names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                for row, text in enumerate(_texts(batch.column(0)), number + 1):
                    yield from _document(text, f"{path}:{row}", field, left_out)
                number += len(batch)
    except pyarrow.ArrowInvalid as error:
        problem = f"{path} ({error})"
        fix = "write it again; it is truncated, or no parquet"
        raise DataError(word("the data", got=problem, allowed="be a parquet file", where=_WHERE, fix=fix)) from error
    except OSError as error:
        raise read_error(error, path, _WHERE) from error


def _texts(column: Any) -> list[object]:
    """The values of a column; one whose bytes are not UTF-8, which parquet does not check, as what is wrong with it."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_text(value) for value in column]


def _text(value: Any) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return _Bad(f"byte {error.start} of it is not UTF-8")


def load(source: str) -> Any:
    """The data set that ``hf:owner/name[:configuration[:split]]`` names; the split is ``train`` unless given.

    Raises:
        MissingExtraError: datasets is not installed.
        DataError: it cannot be loaded; the library's message says why.

    Source: none; the ``datasets`` library loads it.
    """
    name, _, rest = source.removeprefix("hf:").partition(":")
    configuration, _, split = rest.partition(":")
    try:
        import datasets
    except ImportError as error:
        raise _missing_extra(source, "datasets", "datasets") from error
    try:
        return datasets.load_dataset(name, configuration or None, split=split or "train")
    except Exception as error:  # whatever the hub, the cache or a builder raises is about this name
        problem = f"{source} ({type(error).__name__}: {error})"
        fix = "check the name, the configuration, the split and the connection"
        raise DataError(word("the data set", got=problem, allowed="be loadable", where=_WHERE, fix=fix)) from error


def is_data_set(source: object) -> bool:
    """Whether it is a ``datasets.Dataset`` (or a dictionary of them), told without importing the library.

    Source: none; plain bookkeeping.
    """
    return hasattr(source, "column_names") and (hasattr(source, "iter") or hasattr(source, "keys"))


def data_set(source: Any, name: str, field: str, left_out: LeftOut | None = None) -> Iterator[Document]:
    """One document a row of a ``datasets.Dataset``, an empty one where the text is null.

    Args:
        source: the data set.
        name: what to call it.
        field: which column holds the text.
        left_out: told of each row that cannot be read, which is then passed over; None refuses it.

    Raises:
        UsageError: it is a dictionary of splits, or a stream.
        UnknownNameError: there is no such column.
        DataError: a row without text.

    Source: none; plain bookkeeping.
    """
    if hasattr(source, "keys"):
        raise UsageError(
            word(
                "the data set",
                got=f"a DatasetDict with {', '.join(map(str, source.keys()))}",
                allowed="be one split",
                where=_WHERE,
                fix=f"pass [{next(iter(source.keys()), 'train')!r}] of it",
            )
        )
    if not hasattr(source, "select_columns") or not hasattr(source, "_fingerprint"):
        fix = "load it without streaming=True, or save it as jsonl"
        raise UsageError(
            word("the data set", got=type(source).__name__, allowed="be a datasets.Dataset", where=_WHERE, fix=fix)
        )
    _check_column(field, source.column_names, name)
    number = 0
    for batch in source.select_columns([field]).iter(batch_size=_ROWS):
        for row, text in enumerate(batch[field], number + 1):
            yield from _document(text, f"{name}:{row}", field, left_out)
        number += len(batch[field])


def _check_column(field: str, names: Iterable[str], name: str) -> None:
    if field not in names:
        raise nearest(field, names, kind="field", where=f"{name} (pass field= with the column that holds the text)")


def _missing_extra(source: str, extra: str, library: str) -> MissingExtraError:
    return MissingExtraError(
        word(
            library,
            got="no such library",
            allowed=f"be installed to read {source}",
            where=_WHERE,
            fix=f"pip install 'turnout[{extra}]'",
        )
    )
