"""List the methods that turnout has, by room and floor: what each does, whose paper it is, and what was seen of it.

The claims beside a method reproduce its paper, small, and say whether the paper's result was seen; turnout verify
runs them again.

examples:
  turnout methods
  turnout methods split                 one method in full: how it is called, its paper, its claims
  turnout methods muqeeth               those whose name, file, room, line, paper or claim contains this
  turnout methods --room reshape        of one room, or of one floor (reshape.to_sparse, or its last word)
  turnout methods --room token          every router: what it takes, costs, sees and keeps, and what was seen of it
  turnout methods --room decide --json
"""

import argparse
import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

HELP = "what is here, whose paper it is, and what was seen of it"

# What scripts/docs.py read from the source, so that listing methods loads none of them.
CATALOGUE = Path(__file__).with_suffix(".json")
_PACKAGE = Path(__file__).parents[2]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout methods`` takes."""
    parser.add_argument(
        "name", nargs="?", default="", metavar="NAME", help="a method's name, or a part of what is shown"
    )
    parser.add_argument("--room", "--rooms", default="", metavar="ROOM", help="only this room or floor")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Prints the list, or one method in full."""
    catalogue = json.loads(CATALOGUE.read_text(encoding="utf-8"))
    methods = _in_room(catalogue, arguments.room)
    whole = _named(methods, arguments.name)
    chosen = whole or [method for method in methods if _contains(method, arguments.name)]
    if not chosen:
        from turnout.errors import nearest

        names = [method["name"] for method in methods]
        raise nearest(arguments.name, names, kind="method", where="turnout methods")
    if arguments.json:
        print(json.dumps([_as_json(method, catalogue["claims"], whole=bool(whole)) for method in chosen], indent=2))
    elif whole:
        print("\n\n".join("\n".join(_in_full(method, catalogue["claims"])) for method in whole))
    else:
        print("\n".join(_list(chosen, catalogue["rooms"], catalogue["claims"])))
    return 0


def _in_room(catalogue: Mapping[str, object], room: str) -> list[dict]:
    methods: list[dict] = catalogue["methods"]  # type: ignore[assignment]
    wanted = room.removeprefix("turnout.").strip(".")
    if wanted and not any(f"{method['room']}.".startswith(f"{wanted}.") for method in methods):
        floors = {method["room"] for method in methods if method["room"].endswith(f".{wanted}")}
        wanted = floors.pop() if len(floors) == 1 else wanted
    chosen = [method for method in methods if not wanted or f"{method['room']}.".startswith(f"{wanted}.")]
    if not chosen:
        from turnout.errors import nearest

        floors = {method["room"] for method in methods}
        rooms = floors | {floor.partition(".")[0] for floor in floors}
        raise nearest(room, rooms, kind="room", where="turnout methods")
    return chosen


def _named(methods: Sequence[dict], name: str) -> list[dict]:
    """The methods of exactly this name; where there is none, those of it in other letters."""
    exact = [method for method in methods if method["name"] == name]
    return exact or [method for method in methods if method["name"].lower() == name.lower()]


def _contains(method: Mapping[str, str], part: str) -> bool:
    file = method["path"].removeprefix("turnout/").removesuffix(".py").replace("/", ".")
    seen = (method["name"], file, method["room"], method["summary"], *method["papers"], *method["claims"])
    return any(part.lower() in text.lower() for text in seen)


def _list(methods: Sequence[dict], rooms: Mapping[str, str], claims: Mapping[str, dict]) -> Iterator[str]:
    room = None
    for method in methods:
        if method["room"] != room:
            if room:
                yield ""
            room = method["room"]
            yield f"{room}: {rooms[room].replace('``', '')}"
        yield f"  {method['name']:<24} {method['summary'].replace('``', '')}"
        yield f"  {'':<24} {'; '.join(method['papers']) or 'our own'}"
        if traits := method.get("traits"):
            yield f"  {'':<24} takes {traits['pattern']}; {traits['cost']}"
            yield f"  {'':<24} sees {traits['sees']}; state: {traits['state']}"
        if method["claims"]:
            seen = ", ".join(f"{name}: {_verdict(name, claims)}" for name in method["claims"])
            yield f"  {'':<24} claims: {seen}"
    yield ""
    yield "turnout methods NAME shows one in full, turnout verify CLAIM measures a claim again."


def _verdict(name: str, claims: Mapping[str, dict]) -> str:
    return claims[name]["verdict"] if name in claims else "not measured yet"


def _in_full(method: Mapping[str, object], claims: Mapping[str, dict]) -> Iterator[str]:
    yield f"{method['name']}  ({method['room']})"
    yield ""
    yield f"  from {method['import_from']} import {method['name']}"
    yield f"  {method['name']}{method['signature']}"
    yield ""
    yield _documentation(method)
    if traits := method.get("traits"):
        yield ""
        yield from (f"  {name + ':':<9}{said}" for name, said in dict(traits).items())  # pyrefly: ignore[no-matching-overload]
    names: list[str] = method["claims"]  # type: ignore[assignment]
    if names:
        yield ""
        yield "Claims on its paper:"
    for name in names:
        yield f"  {name}: {_verdict(name, claims)}  (turnout verify {name})"
        if name in claims:
            yield f"    {claims[name]['statement']} Off: {claims[name]['off']}."
            yield from (f"    {row}" for row in claims[name]["rows"])
    yield ""
    yield f"Written in {method['path']}"


def _as_json(method: Mapping[str, object], claims: Mapping[str, dict], *, whole: bool) -> dict[str, object]:
    names: list[str] = method["claims"]  # type: ignore[assignment]
    seen = {name: claims.get(name) if whole else _verdict(name, claims) for name in names}
    more = {"documentation": _documentation(method)} if whole else {}
    return {**method, "claims": seen, **more}


def _documentation(method: Mapping[str, object]) -> str:
    """The docstring, read from the source: importing it would load torch."""
    tree = ast.parse((_PACKAGE / str(method["path"])).read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == method["name"]:
            return ast.get_docstring(node) or ""
    raise AssertionError(f"{method['name']} has left {method['path']}: run scripts/docs.py")
