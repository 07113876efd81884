"""A JSON value against its JSON Schema: what the API publishes is what it checks, in the words of this library."""

import difflib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from turnout.errors import word
from turnout.serve.http.errors import ApiError, invalid

__all__ = ["checked"]

Schema = Mapping[str, Any]
_SHOWN = 80  # of a name that somebody sent: it may have millions of letters, and looking for one like it takes long
_WORDS = {
    "null": "null",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "a text",
    "array": "a list",
    "object": "an object",
}


def checked(value: Any, schema: Schema, param: str, where: str) -> Any:
    """The value, if the schema allows it; whole numbers that were written as 3.0 are 3.

    Of JSON Schema it knows type, enum, anyOf, minimum, maximum, exclusiveMinimum, minLength, maxLength, minItems,
    maxItems, items, properties, required, maxProperties and additionalProperties; and ``x-refused``, why no other value
    is taken.

    Args:
        value: of ``json.loads``.
        schema: what it must be.
        param: what the caller calls it; empty for the whole body.
        where: the endpoint.

    Raises:
        ApiError: it is something else; the message says where, what is allowed, and the nearest fix.

    >>> checked({"n": 2.0}, {"type": "object", "properties": {"n": {"type": "integer"}}}, "", "/v1/completions")
    {'n': 2}
    >>> checked({"n": 0}, {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1}}}, "", "/v1/x")
    Traceback (most recent call last):
    turnout.serve.http.errors.ApiError: n must be at least 1 in /v1/x; got 0. Nearest fix: pass n=1.

    Source: none; JSON Schema 2020-12, as far as it is needed.
    """
    if "anyOf" in schema:
        return _any(value, schema["anyOf"], param, where)
    kinds = _kinds(schema)
    if kinds and not any(_is(value, kind) for kind in kinds):
        raise _wrong(param, value, f"be {_list([_WORDS[kind] for kind in kinds])}", where, "", schema)
    if "enum" in schema and not any(value == one and type(value) is type(one) for one in schema["enum"]):
        raise _unlisted(value, schema, param, where)
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | float):
        return _number(value, schema, param, where)
    if isinstance(value, str):
        return _sized(value, schema, param, where, "Length", "characters")
    if isinstance(value, list):
        _sized(value, schema, param, where, "Items", "items")
        items = schema.get("items", {})
        return (
            value
            if _all_tokens(value, items)
            else [checked(one, items, f"{param}[{place}]", where) for place, one in enumerate(value)]
        )
    return _object(value, schema, param, where)


def _all_tokens(values: Sequence[Any], items: Schema) -> bool:
    """Whether all are whole numbers that may be: a prompt may be a million tokens, and each call takes microseconds."""
    if items.keys() != {"type", "minimum", "maximum"} or items["type"] != "integer" or set(map(type, values)) != {int}:
        return False
    return items["minimum"] <= min(values) and max(values) <= items["maximum"]


def _kinds(schema: Schema) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _is(value: Any, kind: str) -> bool:
    if kind == "null":
        return value is None
    if kind == "boolean":
        return isinstance(value, bool)
    if kind in ("integer", "number"):
        whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
        return isinstance(value, int | float) and not isinstance(value, bool) and (kind == "number" or whole)
    return isinstance(value, {"string": str, "array": list, "object": dict}[kind])


def _any(value: Any, branches: Sequence[Schema], param: str, where: str) -> Any:
    """By the branches whose type fits, the last of them telling what is wrong; by all where none does."""
    fitting = [one for one in branches if not _kinds(one) or any(_is(value, kind) for kind in _kinds(one))]
    if not fitting:
        kinds = dict.fromkeys(kind for one in branches for kind in _kinds(one))
        raise _wrong(param, value, f"be {_list([_WORDS[kind] for kind in kinds])}", where, "", {})
    tags = [one.get("properties", {}).get("type", {}).get("enum") for one in fitting]
    if isinstance(value, dict) and all(tags):  # told apart by what their type is
        kinds = {"type": "string", "enum": [tag for one in tags for tag in one]}
        checked(value, {"type": "object", "required": ["type"], "properties": {"type": kinds}}, param, where)
        fitting = [one for one, tag in zip(fitting, tags, strict=True) if value["type"] in tag]
    problems: list[ApiError] = []
    for branch in fitting:
        try:
            return checked(value, branch, param, where)
        except ApiError as error:
            problems.append(error)
    # The one that got furthest: objects that are told apart by their type say what is wrong deeper inside.
    raise max(problems, key=lambda problem: len(problem.param or ""))


def _number(value: int | float, schema: Schema, param: str, where: str) -> int | float:
    if "integer" in _kinds(schema) and "number" not in _kinds(schema):
        value = int(value)
    least, most, above = schema.get("minimum"), schema.get("maximum"), schema.get("exclusiveMinimum")
    if above is not None and value <= above:
        raise _wrong(param, value, f"be above {above}", where, "leave it out", schema)
    if least is not None and value < least:
        allowed = f"be at least {least}" if most is None else f"be from {least} to {most}"
        raise _wrong(param, value, allowed, where, f"pass {param}={least}", schema)
    if most is not None and value > most:
        allowed = f"be at most {most}" if least is None else f"be from {least} to {most}"
        raise _wrong(param, value, allowed, where, f"pass {param}={most}", schema)
    return value


def _sized(value: Any, schema: Schema, param: str, where: str, what: str, words: str) -> Any:
    least, most = schema.get(f"min{what}", 0), schema.get(f"max{what}")
    if len(value) < least:
        got = "none" if not value else str(len(value))
        raise _wrong(param, f"{got}", f"have at least {least} {words}", where, "", schema)
    if most is not None and len(value) > most:
        raise _wrong(param, f"{len(value)}", f"have at most {most} {words}", where, "leave some out", schema)
    return value


def _object(value: dict[str, Any], schema: Schema, param: str, where: str) -> dict[str, Any]:
    known, dot = schema.get("properties", {}), f"{param}." if param else ""
    if len(value) > schema.get("maxProperties", len(value)):
        raise _wrong(param, value, f"have at most {schema['maxProperties']} fields", where, "", schema)
    for name, one in value.items():
        if "x-refused" in known.get(name, {}):  # before what is missing: a picture need not be given a text
            checked(one, known[name], f"{dot}{name}", where)
    for name in schema.get("required", ()):
        if name not in value:
            raise invalid(f"{dot}{name}", got="nothing", allowed="be passed", where=where, fix="add it")
    others = schema.get("additionalProperties", True)
    found: dict[str, Any] = {}
    for name, one in value.items():
        if name in known:
            found[name] = checked(one, known[name], f"{dot}{name}", where)
        elif others is False:
            close = difflib.get_close_matches(name[:_SHOWN], known, n=1, cutoff=0.6)
            fix = f"write {dot}{close[0]}" if close else "leave it out"
            raise _unknown(param or "the body", f"{dot}{name:.{_SHOWN}}", known, fix, where)
        else:
            found[name] = one if others is True else checked(one, others, f"{dot}{name:.{_SHOWN}}", where)
    return found


def _unknown(param: str, got: str, known: Mapping[str, Any], fix: str, where: str) -> ApiError:
    """The refusal of a field that there is not."""
    allowed = f"have fields of {', '.join(known)} alone" if known else "have no fields"
    message = word(param, got=got, allowed=allowed, where=where, fix=fix)
    return ApiError(message, 400, got, "unknown_parameter")


def _unlisted(value: Any, schema: Schema, param: str, where: str) -> ApiError:
    names = [one for one in schema["enum"] if isinstance(one, str)]
    close = difflib.get_close_matches(value[:_SHOWN], names, n=1) if isinstance(value, str) else []
    listed = ", ".join(json.dumps(one) for one in schema["enum"])
    allowed = f"be {listed}" if len(schema["enum"]) == 1 else f"be one of {listed}"
    return _wrong(param, value, allowed, where, f"pass {close[0]!r}" if close else "", schema)


def _wrong(param: str, value: Any, allowed: str, where: str, fix: str, schema: Schema) -> ApiError:
    if why := schema.get("x-refused"):
        return invalid(
            param,
            got=value,
            allowed=f"be left out, {why},",
            where=where,
            fix="leave it out",
            code="unsupported_parameter",
        )
    return invalid(param or "the body", got=value, allowed=allowed, where=where, fix=fix or "correct it")


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
