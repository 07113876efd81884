"""Writes the generated pages: docs/architecture.md, docs/api/<room>.md, docs/methods.md, turnout/cli/methods.json.

    python scripts/docs.py            writes them, and says which changed
    python scripts/docs.py --check    writes nothing; shows the drift, and exits with 1 when there is any

Everything is read from the source (no import of turnout, so no torch) and from docs/claims.json, which
``turnout verify --all --jobs 2 --json docs/claims.json`` writes. The same input gives the same bytes on every machine.
"""

import ast
import difflib
import json
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import catalogue
from house import ROOT, STOREYS, Function, Module, locate, read, summary

NOTICE = "<!-- Written by scripts/docs.py. Change the docstrings instead, then run it. -->"
CATALOGUE = "turnout/cli/methods.json"
VERIFY = "turnout verify --all --jobs 2 --json docs/claims.json"


def pages(modules: Iterable[Module], claims: object) -> dict[str, str]:
    """Every generated page: its path from the repository's root, and its text."""
    table = {module.name: module for module in modules}
    found = {
        "docs/architecture.md": architecture(table),
        "docs/methods.md": methods(claims, catalogue.methods(table)),
        CATALOGUE: listing(claims, table),
    }
    for room in sorted({module.room for module in table.values() if module.is_public}):
        found[f"docs/api/{room}.md"] = api(room, table)
    return found


# ---- docs/architecture.md


def architecture(table: Mapping[str, Module]) -> str:
    """The rooms by storey, and the tree with the first line of every module."""
    lines = [
        NOTICE,
        "# The house",
        "",
        "A file lives in the room of what it returns. It imports from its own room and from lower storeys, never",
        "sideways and never up; the rooms of storey 0 may use each other. `scripts/house.py` holds this and the other",
        "rules, and the tests run it.",
        "",
        "| storey | room | what it is |",
        "|---|---|---|",
    ]
    for storey, rooms in reversed(list(enumerate(STOREYS))):
        for room in rooms:
            if module := table.get(f"turnout.{room}"):
                lines.append(f"| {storey} | [`{room}`](api/{room}.md) | {_cell(module.summary)} |")
    rows = list(_tree(table))
    wide = max(len(name) for name, _ in rows) + 2
    tree = [f"{name:<{wide}}{text}".rstrip() for name, text in rows]
    return "\n".join([*lines, "", "## The tree", "", "```text", *tree, "```"]) + "\n"


def _tree(table: Mapping[str, Module]) -> Iterator[tuple[str, str]]:
    """A folder's own line before what is in it; its files before its folders."""
    modules = sorted(table.values(), key=lambda module: _order(module.path))
    for module in modules:
        parts = module.path.split("/")
        if parts[-1] == "__init__.py":
            yield "  " * (len(parts) - 2) + parts[-2] + "/", module.summary
        else:
            yield "  " * (len(parts) - 1) + parts[-1], module.summary


def _order(path: str) -> list[tuple[bool, str]]:
    *folders, name = path.split("/")
    return [*((True, folder) for folder in folders), (False, "" if name == "__init__.py" else name)]


# ---- docs/api/<room>.md


def api(room: str, table: Mapping[str, Module]) -> str:
    """One line per public name of a room and of the packages in it: signature, first line, link to the source."""
    lines = [NOTICE]
    for module, names in catalogue.sections(room, table):
        level = "#" if module.name.count(".") == 1 else "##"
        lines += [
            "" if level == "##" else None,
            f"{level} `{module.name}`",
            "",
            ast.get_docstring(module.tree) or "",
            "",
        ]
        for name in names:
            found = locate(name, module, table)
            lines += _entry(name, *found) if found else []
    return "\n".join(line for line in lines if line is not None).rstrip() + "\n"


def _entry(name: str, module: Module, node: ast.AST) -> list[str]:
    link = f"- [`{name}`](../../{module.path})"
    if isinstance(node, ast.Module):
        return [f"{link}: {summary(node)}"]
    if isinstance(node, Function):
        return [f"{link}`{_signature(node)}`: {summary(node)}"]
    if not isinstance(node, ast.ClassDef):
        return [f"{link}: {_comment(module, node)}"]
    signature = _constructor(node)
    lines = [f"{link}{f'`{signature}`' if signature else ''}: {summary(node)}"]
    for part in node.body:
        hidden = part.name.startswith("_") or part.name == "extra_repr" if isinstance(part, Function) else True
        if isinstance(part, Function) and not hidden and summary(part):
            marks = {ast.unparse(mark).rpartition(".")[2] for mark in part.decorator_list}
            signature = (
                "" if marks & {"property", "cached_property"} else _signature(part, method="staticmethod" not in marks)
            )
            lines.append(f"  - `.{part.name}{signature}`: {summary(part)}")
    return lines


def _signature(node: Function, *, method: bool = False) -> str:
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    words = [_argument(argument, value) for argument, value in zip(plain, defaults, strict=True)][method:]
    if given.vararg or given.kwonlyargs:
        words.append(f"*{_argument(given.vararg, None) if given.vararg else ''}")
    words += [_argument(argument, value) for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg:
        words.append(f"**{_argument(given.kwarg, None)}")
    result = "" if node.returns is None else f" -> {ast.unparse(node.returns)}"
    return f"({', '.join(words)}){result}"


def _argument(argument: ast.arg, value: ast.expr | None) -> str:
    kind = f": {ast.unparse(argument.annotation)}" if argument.annotation else ""
    equals = " = " if kind else "="
    return argument.arg + kind + (f"{equals}{ast.unparse(value)}" if value is not None else "")


def _constructor(node: ast.ClassDef) -> str:
    """The arguments that make one: of ``__init__``, or the fields of a dataclass or a named tuple."""
    for part in node.body:
        if isinstance(part, Function) and part.name == "__init__":
            return _signature(part, method=True).removesuffix(" -> None")
    marks = " ".join(ast.unparse(mark) for mark in [*node.decorator_list, *node.bases])
    if "dataclass" not in marks and "NamedTuple" not in marks:
        return ""
    fields = []
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and not part.target.id.startswith("_"):
            kind, value = ast.unparse(part.annotation), part.value
            if "ClassVar" in kind or (value is not None and "init=False" in ast.unparse(value)):
                continue
            fields.append(f"{part.target.id}: {kind}" + (f" = {_default(value)}" if value is not None else ""))
    return f"({', '.join(fields)})"


def _default(value: ast.expr) -> str:
    """A field's default as a caller would write it: what the factory makes, not the call of ``field``."""
    if isinstance(value, ast.Call) and ast.unparse(value.func).rpartition(".")[2] == "field":
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in value.keywords}
        factory = given.get("default_factory", "")
        return given.get("default") or {"dict": "{}", "list": "[]", "tuple": "()"}.get(factory, "...")
    return ast.unparse(value)


def _comment(module: Module, node: ast.AST) -> str:
    """What the comment above a constant says."""
    lines, found = module.text.splitlines(), []
    for line in reversed(lines[: getattr(node, "lineno", 1) - 1]):
        if not line.startswith("#"):
            break
        found.insert(0, line.lstrip("#: "))
    return " ".join(found) or "a constant"


# ---- docs/methods.md


def methods(claims: object, found: Iterable[catalogue.Method] = ()) -> str:
    """Every method by room, with its paper and claims; then the table of claims, and where it was measured."""
    context, rows = (dict(claims), claims.get("claims", [])) if isinstance(claims, dict) else ({}, claims)
    rows = rows if isinstance(rows, list) else []
    lines = [
        NOTICE,
        "# Methods, and what is seen of their papers here",
        "",
        "What is here, by room and floor, with the paper it comes from. A claim reproduces a paper small, against its",
        "own ablation; its numbers are [below](#claims). `turnout methods NAME` shows one method in full.",
        *_by_room(found, {claim["name"]: catalogue.verdict(claim) for claim in rows}),
        "",
        "## Claims",
        "",
        "Each claim is one published result, run small on one CPU core, with its mechanism on and off. A number is the",
        "mean over the seeds, ± the standard deviation; lower is better. 'Below' holds when the difference clears the",
        "spread of the paired differences (one-sided, 95 %); 'no worse' when difference and spread together are within",
        "a margin that was written down before; 'at most' when every seed is within the bound, and no control is.",
        "Sizes, rates and margins were settled on seeds below 100; those here were run once, afterwards. A row marked",
        "(headline) is the paper's own comparison, the others hold its mechanism against the same with it switched",
        "off. What does not hold at this scale says so.",
        f"`turnout verify NAME` runs one; `{VERIFY}` measured this table.",
        "",
        "| claim | source | statement | measured | value | control | against | allowed | holds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for claim in rows:
        for number, row in enumerate(claim["evidence"]):
            first = [f"`{claim['name']}`", claim["source"], claim["statement"]] if number == 0 else ["", "", ""]
            metric = f"{row['metric']} (headline)" if row.get("headline") else row["metric"]
            cells = [metric, _mean(row["measured"]), row["against"], _mean(row["control"]), _allowed(row)]
            lines.append(f"| {' | '.join(map(_cell, [*first, *cells, 'yes' if row['holds'] else '**no**']))} |")
    notes = [f"- `{c['name']}`: off is {c['off']}. {c['note']}; {c['seconds']:.0f} s." for c in rows]
    lines += ["", *notes] if notes else []
    where = [f"- {name}: {value}" for name, value in context.items() if name not in ("claims", "format")]
    lines += ["", "Measured with:", "", *where] if where else []
    return "\n".join(lines) + "\n"


def _by_room(found: Iterable[catalogue.Method], verdicts: Mapping[str, str]) -> Iterator[str]:
    room = None
    for method in found:
        if method.room != room:
            room = method.room
            yield from ("", f"## `{room}`", "", "| method | what it does | paper | claims |", "|---|---|---|---|")
        link = f"[`{method.name}`](api/{method.module.room}.md)"
        said = "; ".join(f"`{name}`: {verdicts.get(name, 'not measured yet')}" for name in method.claims)
        cells = [link, method.summary, "; ".join(map(str, method.papers)) or "our own", said or "–"]
        yield f"| {' | '.join(map(_cell, cells))} |"


def listing(claims: object, table: Mapping[str, Module]) -> str:
    """What ``turnout methods`` shows, as JSON."""
    rows = claims.get("claims", []) if isinstance(claims, dict) else claims
    found = catalogue.methods(table)
    body = {
        "rooms": {room.removeprefix("turnout."): table[room].summary for room in dict.fromkeys(m.room for m in found)},
        "methods": [
            {
                "name": method.name,
                "room": method.room.removeprefix("turnout."),
                "import_from": method.home,
                "path": method.module.path,
                "signature": _constructor(method.node)
                if isinstance(method.node, ast.ClassDef)
                else _signature(method.node),
                "summary": method.summary,
                "papers": list(map(str, method.papers)),
                "claims": list(method.claims),
                **({"traits": dict(method.traits)} if method.traits else {}),
            }
            for method in found
        ],
        "claims": catalogue.verdicts(rows if isinstance(rows, list) else []),
    }
    return json.dumps(body, indent=1, ensure_ascii=False) + "\n"


def _allowed(row: Mapping[str, object]) -> str:
    if row["relation"] == "within":
        return f"at most {_number(row['bound'])}"
    if row["relation"] == "below":
        return f"below, by more than {_number(row['spread'])}"
    sum_ = f"{_number(row['difference'])} + {_number(row['spread'])}"
    return f"no worse: {sum_} at most {_number(row['margin'])}, {row['why']}"


def _mean(values: list[float]) -> str:
    return f"{_number(statistics.fmean(values))} ± {_number(statistics.stdev(values))}"


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else str(value)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


# ---- writing and checking


def drift(root: Path, wanted: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """The pages that differ from what they should be, as (is, should be); a page that has no room should be empty."""
    stale = {path.relative_to(root).as_posix(): "" for path in (root / "docs" / "api").glob("*.md")}
    found = {}
    for name, text in sorted((stale | dict(wanted)).items()):
        path = root / name
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        if there != text:
            found[name] = (there, text)
    return found


def main(arguments: list[str]) -> int:
    """Writes the pages, or with ``--check`` only compares them."""
    path = ROOT / "docs" / "claims.json"
    claims = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    changed = drift(ROOT, pages(read(), claims))
    for name, (there, text) in changed.items():
        if "--check" in arguments:
            lines = difflib.unified_diff(there.splitlines(), text.splitlines(), name, "should be", lineterm="", n=0)
            print("\n".join(list(lines)[:20]))
        elif text:
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            (ROOT / name).write_text(text, encoding="utf-8")
            print(f"wrote {name}")
        else:
            (ROOT / name).unlink()
            print(f"removed {name}: there is no such room")
    if changed and "--check" in arguments:
        print(f"{len(changed)} generated pages have drifted: run python scripts/docs.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
