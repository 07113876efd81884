"""Rows with a text field: jsonl line by line, parquet and data sets batch by batch."""

import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from turnout.errors import DataError, MissingExtraError, UsageError, nearest, word
from turnout.reading import parse_json, read_lines
from turnout.storage import read_error
from turnout.train.data.document import Document

_WHERE = "turnout.train.data"
_ROWS = 256


def jsonl(path: Path, field: str) -> Iterator[Document]:
    """One document a line; blank lines are passed over.

    Raises:
        DataError: a line that is not a JSON object with the field as text; says which line.
        StorageError: the file cannot be read.

    Source: none; the format of jsonlines.org.
    """
    try:
        for number, line in enumerate(read_lines(path, refuse=functools.partial(_bad_line, field, str(path))), 1):
            if line.strip():
                yield Document(f"{path}:{number}", _line(line, f"{path}:{number}", field))
    except OSError as error:
        raise read_error(error, path, _WHERE) from error


def _line(line: bytes, name: str, field: str) -> str:
    # Other fields may hold whatever Python writes, NaN too.
    row = parse_json(line, functools.partial(_bad_line, field, name), finite=False)
    if isinstance(row.get(field), str):
        return row[field]
    has = f"a field {field!r} of type {type(row[field]).__name__}" if field in row else f"no field {field!r}"
    fix = "pass field= with the name of the field that holds the text"
    raise _bad_line(field, name, f"{has}; fields: {', '.join(row) or 'none'}", fix)


def _bad_line(field: str, name: str, problem: str, fix: str = "repair or remove the line") -> DataError:
    got, allowed = f"{name} ({problem})", f"be a JSON object with the text in {field!r}"
    return DataError(word("a line", got=got, allowed=allowed, where=_WHERE, fix=fix))


def parquet(path: Path, field: str) -> Iterator[Document]:
    """One document a row.

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
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _check_column(field, names, str(path))
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS, columns=[field]):
                yield from _rows(batch.column(0).to_pylist(), str(path), field, number)
                number += len(batch)
    except pyarrow.ArrowInvalid as error:
        problem = f"{path} ({error})"
        fix = "write it again; it is truncated, or no parquet"
        raise DataError(word("the data", got=problem, allowed="be a parquet file", where=_WHERE, fix=fix)) from error
    except OSError as error:
        raise read_error(error, path, _WHERE) from error


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


def data_set(source: Any, name: str, field: str) -> Iterator[Document]:
    """One document a row of a ``datasets.Dataset``.

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
        yield from _rows(batch[field], name, field, number)
        number += len(batch[field])


def _rows(texts: Iterable[object], name: str, field: str, first: int) -> Iterator[Document]:
    for number, text in enumerate(texts, first + 1):
        if isinstance(text, str):
            yield Document(f"{name}:{number}", text)
        elif text is None:
            yield Document(f"{name}:{number}", "")
        else:
            problem = f"{name}, row {number} ({field!r} is {type(text).__name__})"
            raise DataError(
                word("a row", got=problem, allowed="hold text", where=_WHERE, fix="pass field= with a column of text")
            )


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
