"""Frozen dataclasses as plain JSON values and back, with every type checked: what configurations go to disk as."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping

from turnout.errors import CheckpointError, UsageError, nearest, word

__all__ = ["build", "byte_size", "fit", "plain"]

# Types, for people.
_WORDS: dict[object, str] = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
_DIGITS = re.compile(r"[-+\d.e]*\d")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,3})?")
_DEVICES = "be auto, cpu, cuda, cuda:N (the N-th, from 0) or mps"
# What people write for "whatever accelerator this machine has".
_ACCELERATOR = ("gpu", "nvidia", "amd", "rocm", "hip", "accelerator", "metal", "apple")
# What sizes are said in.
_UNITS = {
    "": 1, "b": 1,
    "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12, "tb": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.ASCII | re.IGNORECASE)


def plain(value: object) -> typing.Any:
    """The value with dataclasses as dicts, tuples as lists: what ``json.dumps`` takes.

    >>> from turnout.types import Cost
    >>> plain(Cost(params=3))["params"]
    3

    Source: none; plain bookkeeping.
    """
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value


def build(kind: type, values: object, where: str) -> typing.Any:
    """The dataclass ``kind`` with these values, each checked against its declared type.

    Raises:
        CheckpointError: the values are not a mapping.
        UnknownNameError: a field that ``kind`` does not have.
        UsageError: a value of the wrong type, or a field without one.

    >>> from turnout.types import Cost
    >>> build(Cost, {"params": 3}, "the example").params
    3

    Source: none; plain bookkeeping.
    """
    if not isinstance(values, Mapping):
        raise CheckpointError(
            word(where, got=values, allowed=f"hold the fields of {kind.__name__}", where="Run.open", fix="restore it")
        )
    hints = typing.get_type_hints(kind)
    names = {field.name for field in dataclasses.fields(kind)}
    unknown = [name for name in values if name not in names]
    if unknown:
        raise nearest(unknown[0], names, kind="field", where=f"{where} (misspelt, or of another version)")
    needed = [
        field.name
        for field in dataclasses.fields(kind)
        if field.default is field.default_factory is dataclasses.MISSING and field.name not in values
    ]
    if needed:
        raise UsageError(
            word(
                f"the fields of {kind.__name__}",
                got=f"none for {', '.join(needed)}",
                allowed="be there, all that have no default",
                where=repr(where),
                fix=f"add {', '.join(needed)}",
            )
        )
    return kind(**{name: fit(item, hints[name], f"{where}: {name}") for name, item in values.items()})


def fit(value: object, kind: typing.Any, where: str) -> typing.Any:
    """The JSON value as the type that a field declares: lists become tuples, whole numbers floats.

    Raises:
        UsageError: the value cannot be of that type.

    >>> fit([1, 2], tuple[int, ...], "the example")
    (1, 2)

    Source: none; plain bookkeeping.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        options = [part for part in parts if part is not type(None)]
        if value is None and type(None) in parts:
            return None
        for option in options[:-1]:
            try:
                return fit(value, option, where)
            except UsageError:
                continue
        return fit(value, options[-1], where)
    if dataclasses.is_dataclass(kind):
        return build(typing.cast(type, kind), value, where)
    if origin is typing.Literal and value in parts:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        inner = parts[:1] * len(value) if parts[1:] == (...,) else parts
        if len(inner) == len(value):
            return tuple(fit(item, part, where) for item, part in zip(value, inner, strict=True))
    if origin in (Mapping, dict, typing.get_origin(Mapping[str, int])) and isinstance(value, Mapping):
        return {key: fit(item, parts[1], where) for key, item in value.items()}
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (object, typing.Any) or (isinstance(kind, type) and type(value) is kind):
        return value
    wanted = _WORDS.get(kind, str(kind)) if origin is not typing.Literal else " or ".join(map(str, parts))
    close = difflib.get_close_matches(str(value), map(str, parts), n=1, cutoff=0.5) if origin is typing.Literal else ()
    fix = f"write {close[0]}" if close else f"write {wanted}"
    got = repr(value) if isinstance(value, str) and _DIGITS.fullmatch(value) else value  # "4" is not 4
    raise UsageError(word("the value", got=got, allowed=f"be {wanted}", where=repr(where), fix=fix))


def device_name(name: object, where: str) -> str:
    """The name of a device, as ``turnout.types.device.check_name`` knows them, which says this without torch.

    Raises:
        UsageError: no such name.

    >>> device_name("cuda:1", "turnout train")
    'cuda:1'

    Source: none; torch's own names.
    """
    if isinstance(name, str) and _DEVICE.fullmatch(name):
        return name
    near = difflib.get_close_matches(str(name).lower(), ("auto", "cpu", "cuda", "mps"), n=1, cutoff=0.5)
    near = ["auto"] if not near or any(text in str(name).lower() for text in _ACCELERATOR) else near
    raise UsageError(word("device", got=repr(name), allowed=_DEVICES, where=where, fix=f"pass device={near[0]}"))


def byte_size(size: int | str, *, what: str, where: str) -> int:
    """The bytes that a size says, as a number or in words: 2GB is 2,000,000,000 and 2GiB 2,147,483,648.

    Args:
        size: bytes, or a number with a unit: kB, MB, GB, TB (thousands) or KiB, MiB, GiB, TiB (of 1024).
        what: the size as the user knows it: ``"--kv-memory"``.
        where: who asks.

    Raises:
        UsageError: no size, or none above 0.

    >>> [byte_size(size, what="--memory", where="here") for size in ("2GB", "1.5 GiB", 4096)]
    [2000000000, 1610612736, 4096]

    Source: IEC 80000-13, for the units.
    """
    fix = f"pass {what} 2GB" if what.startswith("--") else f"pass {what}='2GB'"
    found = _SIZE.fullmatch(str(size)) if not isinstance(size, bool) else None
    unit = _UNITS.get(found[2].lower()) if found else None
    if found is None or unit is None:
        allowed = "be bytes, or a number and a unit of kB, MB, GB, TB, KiB, MiB, GiB, TiB"
        raise UsageError(word(what, got=repr(size), allowed=allowed, where=where, fix=fix))
    bytes_ = int(float(found[1]) * unit) if "." in found[1] else int(found[1]) * unit
    if bytes_ < 1:
        allowed = "be a byte at least"
        raise UsageError(word(what, got=size, allowed=allowed, where=where, fix=f"{fix}, or leave it out"))
    return bytes_
