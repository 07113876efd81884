"""What is public, what of it is a method, whose paper it is and which claim measures it; read from the source.

``scripts/docs.py`` writes what is found to turnout/cli/methods.json, which ``turnout methods`` shows, and to
docs/methods.md. A method is a public function or class whose ``Source:`` names a paper, or says "our own".
"""

import ast
import dataclasses
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping

from house import Function, Module, listed, locate, summary

# The rooms whose public names are methods, in the order in which they are shown: first what decides, then what runs.
# `types` holds nouns, `show` pages, `recipes` runs, `claims` measurements: none of them is a method.
ROOMS = ("decide", "run", "paths", "layers", "models", "train", "reshape", "measure", "solve")
# Floors of files and of architectures; what they cite is a format.
NO_METHODS = ("turnout.models.checkpoint", "turnout.models.families", "turnout.train.data")

# Authors as a `Source:` gives them: "Li et al., 2024", "Kingma and Ba, 2015", "Shazeer, 2020", "Qwen Team, 2024".
_PAPER = re.compile(
    r"(?P<authors>[A-Z][\w.-]+(?: Team| et al\.|(?:, [A-Z]\w+)* (?:and|&) [A-Z]\w+)?), (?P<year>(?:19|20)\d\d)"
    r'(?:, "(?P<title>[^"]+)")?'
)


@dataclasses.dataclass(frozen=True)
class Paper:
    """One paper of a ``Source:``; the title is empty where only authors and year stand."""

    authors: str
    year: str
    title: str

    def __str__(self) -> str:
        return f"{self.authors}, {self.year}" + (f", {self.title}" if self.title else "")

    def is_same(self, other: "Paper") -> bool:
        """Whether the two are one paper, where one of them may give a shorter title."""
        mine, its = (re.sub(r"\W", "", paper.title).lower() for paper in (self, other))
        first, second = (paper.authors.split()[0].rstrip(",") for paper in (self, other))
        titled = bool(mine and its) and (its.startswith(mine) or mine.startswith(its))
        return titled and (first, self.year) == (second, other.year)


@dataclasses.dataclass(frozen=True)
class Method:
    """One method: its name, the deepest and the highest room that list it, where it is written, what it says."""

    name: str
    room: str
    home: str
    module: Module
    node: ast.ClassDef | Function
    summary: str
    source: str
    papers: tuple[Paper, ...]
    claims: tuple[str, ...]
    traits: Mapping[str, str] = dataclasses.field(default_factory=dict)


def methods(table: Mapping[str, Module]) -> list[Method]:
    """Every method, by room and floor in the order of ``ROOMS``, then by name."""
    claimed = dict(_claimed(table))
    found: dict[tuple[str, str], Method] = {}
    for room, name, module, node in _public(table):
        text = ast.get_docstring(node) or ""
        source = " ".join(text.partition("Source:")[2].split())
        if not _PAPER.search(source) and "our own" not in source:
            continue
        cited = tuple(papers(source))
        claims = [name for name, its in claimed.items() if any(one.is_same(two) for one in its for two in cited)]
        # A floor's name is listed by its room too: the floor, which comes later, wins.
        home = found[module.name, name].home if (module.name, name) in found else room
        about = traits(node, module, table) if isinstance(node, ast.ClassDef) else {}
        found[module.name, name] = Method(
            name, room, home, module, node, summary(node), source, cited, tuple(claims), about
        )
    order = {room: number for number, room in enumerate(_rooms(table))}
    return sorted(found.values(), key=lambda method: (order[method.room], method.name.lower()))


def traits(node: ast.ClassDef, module: Module, table: Mapping[str, Module]) -> dict[str, str]:
    """What a ``Takes:`` says of a router, and what its attributes and methods say; nothing of other methods.

    pattern: which experts run for what; cost: of the decision; sees: whether other tokens have a say in it; state: what
    it keeps beside learned weights, and what it has to be told.
    """
    text = (ast.get_docstring(node) or "").partition("Takes:")[2].partition("\n\n")[0]
    if not text:
        return {}
    pattern, _, cost = " ".join(text.split()).removesuffix(".").partition("; ")
    body = list(_members(node, module, table))
    marks = {name: value for name, value in reversed(body) if value is not None}  # a class's own before its bases'
    leaks = {"True": "all tokens of the call", "'training'": "all tokens of the call, in training"}
    sees = leaks.get(marks.get("sees_later_tokens", ""), "the token alone")
    if cost == "none":
        sees = "no token, but what is known of it"
    elif "sequence" in pattern:
        sees = "all tokens of the sequence"
    named = {name for name, value in body if value in (None, "True")}
    state = [said for name, said in _STATE.items() if name in named]
    return {"pattern": pattern, "cost": cost, "sees": sees, "state": "; ".join(state) or "weights alone"}


# What a class has -> what is said of its state.
_STATE = {
    "after_step": "moves after each step",
    "register_buffer": "buffers",
    "needs_carry": "told by the layer before",
    "needs_experts": "runs the experts",
    "needs_given": "told of sequences (given)",
}


def _members(node: ast.ClassDef, module: Module, table: Mapping[str, Module]) -> Iterator[tuple[str, str | None]]:
    """What a class and its bases define: methods and called functions by name, attributes with their values."""
    for part in ast.walk(node):
        if isinstance(part, ast.FunctionDef):
            yield part.name, None
        elif isinstance(part, ast.Call) and isinstance(part.func, ast.Attribute):
            yield part.func.attr, None
    for part in node.body:
        if isinstance(part, ast.Assign) and isinstance(part.targets[0], ast.Name):
            yield part.targets[0].id, ast.unparse(part.value)
    for base in node.bases:
        there, its = locate(ast.unparse(base), module, table) or (module, None)
        if isinstance(its, ast.ClassDef):
            yield from _members(its, there, table)


def papers(source: str) -> Iterator[Paper]:
    """The papers of a ``Source:``, each once."""
    seen = set()
    for one in _PAPER.finditer(source):
        paper = Paper(one["authors"], one["year"], one["title"] or "")
        if (paper.authors, paper.year) not in seen:
            seen.add((paper.authors, paper.year))
            yield paper


def _rooms(table: Mapping[str, Module]) -> list[str]:
    """The public packages of the rooms of methods; a room stands before its floors."""
    names = [module.name for module in table.values() if module.is_public and not module.name.startswith(NO_METHODS)]
    return [name for room in ROOMS for name in names if f"{name}.".startswith(f"turnout.{room}.")]


def _public(table: Mapping[str, Module]) -> Iterator[tuple[str, str, Module, ast.ClassDef | Function]]:
    for room in _rooms(table):
        for name in listed(table[room]) or []:
            module, node = locate(name, table[room], table) or (None, None)
            if module is None or module.name.startswith(NO_METHODS):
                continue
            if isinstance(node, Function) or (isinstance(node, ast.ClassDef) and not _is_noun(node)):
                yield room, name, module, node


def _is_noun(node: ast.ClassDef) -> bool:
    """A settings, state or result class: what methods take and give."""
    return any("dataclass" in ast.unparse(mark) for mark in node.decorator_list) or any(
        ast.unparse(base) in ("NamedTuple", "Protocol") for base in node.bases
    )


def _claimed(table: Mapping[str, Module]) -> Iterator[tuple[str, tuple[Paper, ...]]]:
    """The claims, each with the papers that it reproduces."""
    room = table.get("turnout.claims")
    for name in (listed(room) or []) if room else []:
        _, node = locate(name, room, table) or (None, None)  # type: ignore[arg-type]
        # A claim is often called as its module is; then the function in it is the claim.
        node = node if isinstance(node, Function) else _function(node, name)
        yield name, tuple(papers((ast.get_docstring(node) or "") if node else ""))


def _function(tree: ast.AST | None, name: str) -> Function | None:
    body = tree.body if isinstance(tree, ast.Module) else []
    return next((node for node in body if isinstance(node, Function) and node.name == name), None)


def sections(room: str, table: Mapping[str, Module]) -> Iterator[tuple[Module, list[str]]]:
    """A room and the packages in it, each with the names that no package further in lists."""
    for module in (module for module in table.values() if module.room == room and module.is_public):
        floors = [inner for inner in table.values() if inner.is_public and inner.name.startswith(f"{module.name}.")]
        shown = {name for floor in floors for name in listed(floor) or [] if not floor.name.endswith(f".{name}")}
        yield module, [name for name in listed(module) or [] if name not in shown]


# ---- what was measured


def verdicts(claims: Iterable[Mapping[str, object]]) -> dict[str, dict[str, object]]:
    """Claim -> what it says, whether it holds, and its rows in words."""
    return {
        str(claim["name"]): {
            "statement": claim["statement"],
            "off": claim["off"],
            "verdict": verdict(claim),
            "rows": [_row(row) for row in claim["evidence"]],  # type: ignore[attr-defined]
        }
        for claim in claims
    }


def verdict(claim: Mapping[str, object]) -> str:
    """``holds``, or what of it does not."""
    if claim["holds"]:
        return "holds"
    return "mechanism holds, headline does not" if claim.get("mechanism") else "does not hold"


def _row(row: Mapping[str, object]) -> str:
    measured, control = (statistics.fmean(row[side]) for side in ("measured", "control"))  # type: ignore[arg-type]
    headline = " (the paper's headline)" if row.get("headline") else ""
    seen = "yes" if row["holds"] else "NO"
    return f"{row['metric']}{headline}: {measured:.4g} against {control:.4g}, {row['against']}: {seen}"
