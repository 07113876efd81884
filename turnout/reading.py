"""Files that others wrote, read with bounds: on what they are, where they lie, how long and how deep they are."""

import errno
import json
import math
import os
import re
import stat
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from turnout.errors import CheckpointError, TurnoutError, word

__all__ = [
    "LINE_BYTES",
    "TOKENIZER_BYTES",
    "Refuse",
    "check_fields",
    "check_link",
    "check_safetensors",
    "open_regular",
    "parse_json",
    "plain_name",
    "read_json",
    "read_lines",
    "read_text",
]

# From what is wrong with a file, as a phrase, to the error to raise.
Refuse = Callable[[str], TurnoutError]
_MIB = 1 << 20
# A configuration takes kilobytes; the index of 100,000 tensors 10 MiB; a tokenizer of 256,000 tokens 35 MiB.
_JSON_BYTES = 64 * _MIB
TOKENIZER_BYTES = 256 * _MIB
LINE_BYTES = 64 * _MIB
# The most that safetensors itself reads.
_HEADER_BYTES = 100_000_000
# The most that the usual file systems take.
_NAME_BYTES = 255
_DEPTH = 64
_WHOLE = 1 << 63


def open_regular(path: str | Path, *, refuse: Refuse | None = None, any_link: bool = False) -> BinaryIO:
    """The file, opened for reading, if it is one: a pipe would block for ever, a device has no end.

    Args:
        path: the file.
        refuse: words what is wrong; None for a CheckpointError that names the path.
        any_link: follow links wherever they lead: for a file that the user named, not one found in a folder.

    Raises:
        TurnoutError: not a regular file, or a link that leaves its folder.
        OSError: there is no such file, or it may not be read.

    >>> open_regular("/dev/null")
    Traceback (most recent call last):
    turnout.errors.CheckpointError: the file must be readable in turnout; got /dev/null (a device, not a file)...

    Source: none; plain bookkeeping.
    """
    path, refuse = Path(path), refuse or _refusing(path)
    if not any_link:
        check_link(path, refuse)
    if "\0" in str(path):
        raise refuse("a name with a zero byte")
    # Opened before it is looked at, so that nothing can be put in its place in between.
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except PermissionError as error:
        if path.is_dir():  # which Windows opens for nobody
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from error
        raise
    mode = os.fstat(handle).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(handle, "rb")
    os.close(handle)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise refuse("a pipe, not a file" if stat.S_ISFIFO(mode) else "a device, not a file")


def check_link(path: Path, refuse: Refuse | None = None) -> None:
    """Refuses a link out of its folder; links within it, and those of the hub's cache, are what they lead to.

    The cache keeps ``models--owner--name/snapshots/<revision>/<file> -> ../../blobs/<hash>``: there a link may lead
    anywhere within ``models--owner--name``.

    Raises:
        TurnoutError: the link leaves the folder; what ``refuse`` words.

    >>> check_link(Path("no/such/file"))

    Source: the layout of huggingface_hub's cache.
    """
    if not path.is_symlink():
        return
    home = path.parent.resolve()
    for place in (home, *home.parents):
        if place.parent.name == "snapshots" and "--" in place.parent.parent.name:
            home = place.parent.parent
            break
    target = path.resolve()
    if not target.is_relative_to(home):
        raise (refuse or _refusing(path))(f"a link to {target}, outside its folder: put the file itself there")


def plain_name(name: object, refuse: Refuse) -> str:
    """The name, if it is the name of a file and nothing more: no folder, no drive, not empty.

    Raises:
        TurnoutError: what ``refuse`` words.

    >>> plain_name("model.safetensors", _refusing(Path("index.json")))
    'model.safetensors'

    Source: none; plain bookkeeping.
    """
    sound = isinstance(name, str) and 0 < len(name.encode(errors="replace")) <= _NAME_BYTES and name not in (".", "..")
    if not isinstance(name, str) or not sound or re.search(r"[/\\:\x00-\x1f]", name):
        raise refuse(f"{name!r:.80} where the plain name of a file belongs")
    return name


def read_text(
    path: str | Path, *, refuse: Refuse | None = None, limit: int = _JSON_BYTES, any_link: bool = False
) -> str:
    """The text of a UTF-8 file of at most ``limit`` bytes.

    Raises:
        TurnoutError: not a regular file, too long, or not UTF-8; what ``refuse`` words.
        OSError: there is no such file, or it may not be read.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     read_text(file.name)
    ''

    Source: none; plain bookkeeping.
    """
    refuse = refuse or _refusing(path)
    with open_regular(path, refuse=refuse, any_link=any_link) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise refuse(f"longer than {limit:,} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise refuse(f"not UTF-8: {error}") from error


def read_lines(path: str | Path, *, refuse: Refuse | None = None, limit: int = LINE_BYTES) -> Iterator[bytes]:
    """The lines of a file that the user named, each of at most ``limit`` bytes.

    Raises:
        TurnoutError: not a regular file, or a longer line; what ``refuse`` words.
        OSError: there is no such file, or it may not be read.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     list(read_lines(file.name))
    []

    Source: none; plain bookkeeping.
    """
    refuse = refuse or _refusing(path)
    with open_regular(path, refuse=refuse, any_link=True) as file:
        number = 0
        while line := file.readline(limit + 1):
            number += 1
            if len(line) > limit:
                raise refuse(f"line {number} is longer than {limit:,} bytes")
            yield line


def read_json(
    path: str | Path,
    *,
    refuse: Refuse | None = None,
    top: type | tuple[type, ...] = dict,
    limit: int = _JSON_BYTES,
    finite: bool = True,
    any_link: bool = False,
) -> Any:
    """What a JSON file holds, read with bounds: on its size, its depth, its numbers and what it may be.

    Args:
        path: the file.
        refuse: words what is wrong; None for a CheckpointError that names the path.
        top: what it must hold: an object, unless ``list`` is asked for.
        limit: in bytes.
        finite: refuse NaN and infinities, which JSON does not have and Python writes.
        any_link: follow links wherever they lead.

    Raises:
        TurnoutError: not a regular file, too long, not UTF-8, not JSON, nested too deep, a key given twice, a number
            that is not finite, or another type; what ``refuse`` words.
        OSError: there is no such file, or it may not be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     size = Path(folder, "a.json").write_text('{"r": 8}')
    ...     read_json(Path(folder, "a.json"))
    {'r': 8}

    Source: none; what RFC 8259 leaves to the reader.
    """
    refuse = refuse or _refusing(path)
    text = read_text(path, refuse=refuse, limit=limit, any_link=any_link)
    return parse_json(text, refuse, top=top, finite=finite)


def parse_json(
    text: str | bytes, refuse: Refuse, *, top: type | tuple[type, ...] = dict, finite: bool = True, depth: int = _DEPTH
) -> Any:
    """What a JSON text holds; see ``read_json``.

    Raises:
        TurnoutError: what ``refuse`` words.

    >>> parse_json('{"a": 1, "a": 2}', _refusing(Path("a.json")))
    Traceback (most recent call last):
    turnout.errors.CheckpointError: the file must be readable in turnout; got a.json (the key 'a' twice)...

    Source: none; what RFC 8259 leaves to the reader.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) < len(pairs):
            names = [name for name, _ in pairs]
            raise refuse(f"the key {next(name for name in names if names.count(name) > 1)!r:.80} twice")
        return made

    def number(digits: str) -> float:
        value = float(digits)
        if finite and not math.isfinite(value):
            raise refuse(f"{digits:.40}, which is not a finite number")
        return value

    try:
        text = text.decode() if isinstance(text, bytes) else text
        body = json.loads(text, object_pairs_hook=unique, parse_float=number, parse_constant=number)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half a character cannot be written or shown again
            json.dumps(body, ensure_ascii=False).encode()
    except TurnoutError:
        raise
    except UnicodeEncodeError as error:
        raise refuse("half a character, which no text can hold") from error
    except RecursionError as error:
        raise refuse(f"nested deeper than {depth} levels") from error
    except ValueError as error:
        raise refuse(str(error)) from error
    if text.count("[") + text.count("{") > depth and _deeper(body, depth):
        raise refuse(f"nested deeper than {depth} levels")
    if not isinstance(body, top):
        raise refuse(f"a JSON {type(body).__name__}")
    return body


def check_safetensors(path: Path, refuse: Refuse | None = None, *, any_link: bool = False) -> None:
    """Refuses what safetensors would read without a word: a link out of the folder, a pipe, a tensor named twice.

    Args:
        path: the file. Of its bytes, the header is read.
        refuse: words what is wrong; None for a CheckpointError that names the path.
        any_link: follow links wherever they lead.

    Raises:
        TurnoutError: what ``refuse`` words; all else about the file is the library's to say.
        OSError: there is no such file, or it may not be read.

    >>> check_safetensors(Path("/dev/zero"))
    Traceback (most recent call last):
    turnout.errors.CheckpointError: the file must be readable in turnout; got /dev/zero (a device, not a file)...

    Source: the file format of safetensors.
    """
    refuse = refuse or _refusing(path)
    with open_regular(path, refuse=refuse, any_link=any_link) as file:
        size = int.from_bytes(file.read(8), "little")
        left = os.fstat(file.fileno()).st_size - 8
        if not 2 <= size <= min(left, _HEADER_BYTES):
            raise refuse(f"a header of {size:,} bytes in a file of {left + 8:,}")
        header = parse_json(file.read(size), refuse)
    metadata = header.get("__metadata__")
    check_fields(header, dict.fromkeys(header, dict), refuse)
    if metadata is not None:
        check_fields(metadata, dict.fromkeys(metadata, str), refuse)


def check_fields(body: Mapping[str, Any], kinds: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuses an object without one of these fields, or with one of another type.

    Args:
        body: what was read.
        kinds: name -> type: ``int``, ``float`` (whole numbers too), ``str``, ``bool``, ``list[int]``,
            ``dict[str, int]``, ``Literal``, or a union; a field whose union has None may be missing.
        refuse: words what is wrong.

    Raises:
        TurnoutError: names the field, its value and its type; what ``refuse`` words.

    >>> check_fields({"r": "8"}, {"r": int}, _refusing("adapter_config.json"))
    Traceback (most recent call last):
    turnout.errors.CheckpointError: the file must be readable in turnout; got adapter_config.json ('r' is '8', which...

    Source: none; plain bookkeeping.
    """
    for name, kind in kinds.items():
        if name not in body and not _is(None, kind):
            raise refuse(f"it lacks {name!r}")
        if not _is(body.get(name), kind):
            raise refuse(f"{name!r} is {_shown(body.get(name))}, which must be {_words(kind)}")


def _is(value: object, kind: Any) -> bool:
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_is(value, part) for part in parts)
    if origin is typing.Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is list:
        return isinstance(value, list) and all(_is(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is(item, parts[1]) for item in value.values())
    if kind is float and type(value) is float:
        return math.isfinite(value)
    if kind in (int, float):
        return type(value) is int and abs(value) < _WHOLE
    return kind is Any or (value is None if kind in (None, types.NoneType) else type(value) is kind)


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind).replace("typing.", "")


def _deeper(body: object, depth: int) -> bool:
    level = [body]
    for _ in range(depth):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return False
    return True


def _shown(value: object) -> str:
    kind = "an object" if isinstance(value, dict) else "a list" if isinstance(value, list) else ""
    if isinstance(value, int) and abs(value) >= _WHOLE:
        return "a whole number beyond 64 bits"
    return kind if kind and value else f"{value!r:.80}"


def _refusing(path: str | Path) -> Refuse:
    fix = "restore it from a copy, or name another file"

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(
            word("the file", got=f"{path} ({problem})", allowed="be readable", where="turnout", fix=fix)
        )

    return refuse
