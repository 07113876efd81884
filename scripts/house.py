"""The rules of the house, checked by reading the source. Nothing is imported, so it takes a second.

    python scripts/house.py        prints what breaks a rule, one line each; exit code 1 when there is any

A rule is a function that takes the modules and yields lines ``path:line: what is wrong``. ``RULES`` lists them;
tests/test_planted.py plants a violation of each and sees it caught.
"""

import ast
import dataclasses
import functools
import itertools
import re
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The storeys, from the ground up. A file imports from its own room and from lower storeys; only the rooms of the
# ground floor, the nouns and what they stand on, may import each other.
STOREYS = (
    ("moved", "errors", "reading", "storage", "hub", "fields", "expects", "wrappers", "types"),
    ("solve",),
    ("decide", "run", "measure"),
    ("paths", "show"),
    ("layers",),
    ("models",),
    ("train",),
    ("serve", "reshape"),
    ("recipes", "claims"),
    ("cli",),
)
STOREY = {room: number for number, rooms in enumerate(STOREYS) for room in rooms}
EMPTY_NAMES = {"util", "utils", "helper", "helpers", "common", "misc", "base", "core", "manager"}
MODULE_LINES, FUNCTION_LINES = 400, 60
KERNELS = "turnout.run.kernels."  # its files may import triton, which comes with torch for CUDA alone
UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
FLAGS = {"allow_pickle=True", "weights_only=False", "shell=True", "trust_remote_code=True"}
BARE_ERRORS = {"Exception", "IndexError", "KeyError", "OSError", "RuntimeError", "TypeError", "ValueError"}

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@dataclasses.dataclass(frozen=True)
class Module:
    """One source file: its path from the repository's root, with forward slashes, and its text."""

    path: str
    text: str

    @functools.cached_property
    def tree(self) -> ast.Module:
        """The parsed text."""
        return ast.parse(self.text, self.path)

    @property
    def name(self) -> str:
        """``turnout.run.sort`` for ``turnout/run/sort.py``; the package for an ``__init__``."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def room(self) -> str:
        """``run`` for anything in ``turnout/run``; empty for the package's own ``__init__``."""
        return self.name.partition(".")[2].partition(".")[0]

    @property
    def is_public(self) -> bool:
        """Whether users import from it: a package, or a room that is one file."""
        return self.room in STOREY and (self.path.endswith("/__init__.py") or self.name.count(".") == 1)

    @property
    def summary(self) -> str:
        """The first line of the docstring."""
        return summary(self.tree)


def read(root: Path = ROOT, folder: str = "turnout") -> list[Module]:
    """Every Python file below a folder of the repository, sorted by path."""
    paths = sorted((root / folder).rglob("*.py"))
    return [Module(path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def summary(node: ast.Module | Definition) -> str:
    """The first line of a docstring; empty without one."""
    return (ast.get_docstring(node) or "").strip().partition("\n")[0]


def listed(module: Module) -> list[str] | None:
    """The names in a literal ``__all__``; None when there is none, or it is not a literal list of texts."""
    for node in module.tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            try:
                names = ast.literal_eval(node.value)  # type: ignore[attr-defined]
            except ValueError:
                return None
            return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
    return None


def bindings(module: Module) -> dict[str, ast.stmt]:
    """Every name that the module's own level binds, with the statement that does."""
    found: dict[str, ast.stmt] = {}
    for node in module.tree.body:
        if isinstance(node, Definition):
            found[node.name] = node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0]: node for alias in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return found


def locate(name: str, module: Module, modules: Mapping[str, Module]) -> tuple[Module, ast.AST] | None:
    """Where a public name is defined: the module and the node, through any chain of imports; a sub-package, whole."""
    seen: set[tuple[str, str]] = set()
    while (module.name, name) not in seen:
        seen.add((module.name, name))
        node = bindings(module).get(name)
        source = node.module or "" if isinstance(node, ast.ImportFrom) else module.name
        if isinstance(node, ast.ImportFrom):
            name = next(alias.name for alias in node.names if name in (alias.asname, alias.name))
        elif node is not None:
            return module, node
        inner, package = modules.get(f"{source}.{name}"), modules.get(source)
        # A package whose __init__ binds a name means that, not the file beside it that is called the same.
        if inner and not (package and package is not module and name in bindings(package)):
            return inner, inner.tree
        if source not in modules:
            break
        module = modules[source]
    return None


# ---- rules


def imports_go_down(modules: Iterable[Module]) -> Iterator[str]:
    """A file imports from its own room and from lower storeys: never sideways, never up."""
    for module in modules:
        shown = set(imported_for_checkers(module)) if module.room == "" else set()
        if module.room not in STOREY and module.room not in ("", "__main__"):
            yield f"{module.path}:1: {module.room!r} is not a room; the rooms are in scripts/house.py: STOREYS"
            continue
        for line, target in imported(module):
            room = target.partition(".")[2].partition(".")[0]
            if target.partition(".")[0] != "turnout" or target == "turnout.__version__" or module.room == "__main__":
                continue
            if "moved" in (room, module.room):  # it stands below all rooms and leads to their new places
                continue
            if room not in STOREY:
                yield f"{module.path}:{line}: imports {target!r}: name the room that holds it"
            elif module.room == "":
                if (line, target) not in shown:
                    yield f"{module.path}:{line}: imports {target!r}: `import turnout` loads no room"
            elif STOREY[room] > STOREY[module.room]:
                yield f"{module.path}:{line}: {module.room} imports up, from {room}"
            elif STOREY[room] == STOREY[module.room] > 0 and room != module.room:
                yield f"{module.path}:{line}: {module.room} imports sideways, from {room}"


def imported(module: Module) -> Iterator[tuple[int, str]]:
    """Every import in a file, inside functions too, as (line, dotted target)."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = "turnout." + "." * node.level if node.level else node.module or ""
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "importlib.import_module", "__import__"):
            target = node.args[0] if node.args else None
            begins = target.values[0] if isinstance(target, ast.JoinedStr) and target.values else target
            if not isinstance(begins, ast.Constant):
                begins = ast.Constant("turnout.")
            if target is begins:
                yield node.lineno, str(begins.value)
            elif module.room not in ("", "cli") or begins.value != "turnout.":
                # A name made at run time: what stands before the made part must say the room, save at the very top.
                yield node.lineno, f"{begins.value}*"


def imports_have_no_cycle(modules: Iterable[Module]) -> Iterator[str]:
    """No module imports itself, by way of others; imports inside functions count."""
    table = {module.name: module for module in modules}
    edges: dict[str, list[str]] = {}
    for module in table.values():
        steps = (target for _, target in imported(module) if not target.endswith("*"))
        found = (step if step in table else step.rpartition(".")[0] for step in steps)
        edges[module.name] = sorted({step for step in found if step in table and step != "turnout"})
    done: set[str] = set()
    for start in sorted(edges):
        for cycle in _cycles(start, edges, [], done):
            yield f"{table[cycle[0]].path}:1: imports itself: {' -> '.join(cycle)}"


def _cycles(name: str, edges: Mapping[str, list[str]], path: list[str], done: set[str]) -> Iterator[list[str]]:
    if name in path:
        yield [*path[path.index(name) :], name]
    elif name not in done:
        for step in edges[name]:
            yield from _cycles(step, edges, [*path, name], done)
        done.add(name)


def imports_are_declared(modules: Iterable[Module], root: Path = ROOT) -> Iterator[str]:
    """A library is a dependency in pyproject.toml; an optional one is imported where it is used, not at the top."""
    modules = list(modules)
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: wants for name, wants in project["optional-dependencies"].items() if name not in ("dev", "docs")}
    required, optional = _distributions(project["dependencies"]), _distributions(itertools.chain(*extras.values()))
    known = required | optional | set(sys.stdlib_module_names) | {"turnout"}
    on_cuda = cuda_only(modules)
    for module in modules:
        top = set(imported_at_top(module))
        for line, target in imported(module):
            library = target.partition(".")[0]
            if library not in known:
                yield f"{module.path}:{line}: imports {library}, which pyproject.toml does not declare"
            elif library in optional - {"triton", "turnout"} and (line, target) in top:
                yield f"{module.path}:{line}: imports {library} at the top; it is optional: import it in use"
        if module.name in on_cuda and not module.name.startswith(KERNELS):
            yield f"{module.path}:1: loads triton, which only torch for CUDA has: import it in use"


def imported_at_top(module: Module) -> Iterator[tuple[int, str]]:
    """The imports that run when the file does: those outside functions, and not for type checkers alone."""
    functions = [node for node in ast.walk(module.tree) if isinstance(node, Function)]
    shown = set(imported_for_checkers(module))
    for line, target in imported(module):
        inside = any(function.lineno <= line <= (function.end_lineno or line) for function in functions)
        if not inside and (line, target) not in shown:
            yield line, target


def imported_for_checkers(module: Module) -> Iterator[tuple[int, str]]:
    """The imports under ``if TYPE_CHECKING:``, which never run; those under its ``else`` do."""
    blocks = [
        node
        for node in ast.walk(module.tree)
        if isinstance(node, ast.If) and ast.unparse(node.test).rpartition(".")[2] == "TYPE_CHECKING"
    ]
    for line, target in imported(module):
        if any(block.lineno < line <= (block.body[-1].end_lineno or line) for block in blocks):
            yield line, target


def cuda_only(modules: Iterable[Module]) -> set[str]:
    """The names of the modules that need triton to load, at first or second hand."""
    edges = {module.name: [target for _, target in imported_at_top(module)] for module in modules}
    found = {"triton"}
    while more := {name for name in edges.keys() - found for t in edges[name] if {t, t.rpartition(".")[0]} & found}:
        found |= more
    return found - {"triton"}


def _distributions(wants: Iterable[str]) -> set[str]:
    return {re.split(r"[^\w-]", want)[0].replace("-", "_") for want in wants}


def names_say_something(modules: Iterable[Module]) -> Iterator[str]:
    """No file, folder or class is called utils, helpers, common, misc, base, core or manager."""
    for module in modules:
        for part in module.path.removesuffix(".py").split("/"):
            if empty := EMPTY_NAMES & set(part.lower().split("_")):
                yield f"{module.path}:1: the name {part!r} says nothing ({', '.join(sorted(empty))})"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.ClassDef):
                words = {word.lower() for word in re.findall(r"[A-Z][a-z]+", node.name)}
                if empty := EMPTY_NAMES & words:
                    yield f"{module.path}:{node.lineno}: the name {node.name!r} says nothing ({', '.join(empty)})"


def sizes_stay_small(modules: Iterable[Module]) -> Iterator[str]:
    """A module is under 400 lines, a function under 60, docstrings included."""
    for module in modules:
        lines = module.text.count("\n")
        if lines >= MODULE_LINES:
            yield f"{module.path}:1: {lines} lines; a module is under {MODULE_LINES}"
        for node in ast.walk(module.tree):
            if isinstance(node, Function):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                if lines >= FUNCTION_LINES:
                    limit = f"a function is under {FUNCTION_LINES}"
                    yield f"{module.path}:{node.lineno}: {node.name} has {lines} lines; {limit}"


def rooms_list_their_names(modules: Iterable[Module]) -> Iterator[str]:
    """Every module has a docstring; every room a literal ``__all__`` whose names exist."""
    table = {module.name: module for module in modules}
    for module in table.values():
        if not module.summary:
            yield f"{module.path}:1: has no docstring; its first line goes into docs/architecture.md"
        if module.name.count(".") > 1 and module.name.rpartition(".")[0] not in table:
            yield f"{module.path}:1: its folder has no __init__.py"
        names = listed(module)
        if names is None:
            if module.is_public:
                yield f"{module.path}:1: has no literal __all__"
            continue
        if module.room == "":
            continue  # its names load on first use; tests/test_exports.py loads them
        if len(set(names)) < len(names):
            yield f"{module.path}:1: __all__ names something twice"
        for name in names:
            if name not in bindings(module) and f"{module.name}.{name}" not in table:
                yield f"{module.path}:1: __all__ names {name!r}, which does not exist"
            elif module.is_public and not locate(name, module, table):
                yield f"{module.path}:1: __all__ names {name!r}, which is not found where it is imported from"


def nothing_dangerous(modules: Iterable[Module]) -> Iterator[str]:
    """Nothing is unpickled or evaluated, no error is swallowed, and a user's mistake is worded, not asserted."""
    for module in modules:
        guarded = {
            id(inner)
            for node in ast.walk(module.tree)
            if isinstance(node, ast.Try) and node.handlers
            for part in node.body
            for inner in ast.walk(part)
        }
        for node in ast.walk(module.tree):
            for problem in _dangers(node, caught=id(node) in guarded):
                yield f"{module.path}:{node.lineno}: {problem}"  # type: ignore[attr-defined]


def _dangers(node: ast.AST, *, caught: bool) -> Iterator[str]:
    if isinstance(node, ast.Import | ast.ImportFrom):
        libraries = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        for library in libraries:
            if library.partition(".")[0] in UNPICKLERS:
                yield f"imports {library}: nothing is unpickled; use safetensors and json"
        if isinstance(node, ast.ImportFrom) and node.module == "torch" and any(n.name == "load" for n in node.names):
            yield "imports torch.load, which unpickles: use safetensors"
    elif isinstance(node, ast.Call):
        yield from _dangerous_call(node)
    elif isinstance(node, ast.ExceptHandler):
        wide = node.type is None or (isinstance(node.type, ast.Name) and node.type.id in ("Exception", "BaseException"))
        if node.type is None:
            yield "a bare except: name the exceptions"
        elif wide and all(isinstance(step, ast.Pass | ast.Continue) for step in node.body):
            yield "swallows every error: name the exceptions, or say what happened"
    elif isinstance(node, ast.Raise) and node.exc:
        name = _called(node.exc) if isinstance(node.exc, ast.Call) else getattr(node.exc, "id", "")
        if name == "NotImplementedError":
            yield "a stub: write it, or leave it out"
        elif name in BARE_ERRORS and not caught:
            yield f"raises {name}: raise an error of turnout.errors, with word()"
    elif isinstance(node, Function) and (not node.name.startswith("_") or node.name == "__init__"):
        yield from _asserted(node)


def _dangerous_call(node: ast.Call) -> Iterator[str]:
    name = _called(node)
    if name in ("torch.load", "torch.jit.load", "torch.hub.load", "yaml.load"):
        yield f"calls {name}, which runs what a file says: use safetensors and json"
    if name.rpartition(".")[2] == "getrefcount":
        yield "counts references, of which each version of Python has others: own it, as turnout.run.pool does"
    if name in ("eval", "exec", "os.system"):
        yield f"calls {name}: nothing is evaluated"
    for keyword in node.keywords:
        if ast.unparse(keyword) in FLAGS:
            yield f"passes {ast.unparse(keyword)}"


def _asserted(function: Function) -> Iterator[str]:
    arguments = function.args
    names = {a.arg for a in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]} - {"self", "cls"}
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            used = {inner.id for inner in ast.walk(node.test) if isinstance(inner, ast.Name)} & names
            if used:
                yield f"{function.name} asserts on its argument {', '.join(sorted(used))}: raise a worded error"


def _called(node: ast.Call) -> str:
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def public_names_are_documented(modules: Iterable[Module]) -> Iterator[str]:
    """Every public class and function has a docstring with a ``Source:`` and a doctest; an exception, a docstring."""
    table = {module.name: module for module in modules}
    for module in table.values():
        for name in listed(module) or [] if module.is_public else []:
            found = locate(name, module, table)
            if found is None or not isinstance(found[1], Definition):
                continue
            text = ast.get_docstring(found[1]) or ""
            is_exception = found[0].room == "errors" and isinstance(found[1], ast.ClassDef)
            wanted = [] if is_exception else ["Source:", ">>>"]
            missing = [part for part in wanted if part not in text] if text else ["a docstring"]
            if missing:
                yield f"{found[0].path}:{found[1].lineno}: {name} lacks {' and '.join(missing)}"


RULES = (
    imports_go_down,
    imports_have_no_cycle,
    imports_are_declared,
    names_say_something,
    sizes_stay_small,
    rooms_list_their_names,
    nothing_dangerous,
    public_names_are_documented,
)


def main() -> int:
    """Prints every violation in turnout/, and of the rules on names in the other folders."""
    found = [line for rule in RULES for line in rule(read())]
    others = [module for folder in ("tests", "scripts", "examples", "benchmarks") for module in read(ROOT, folder)]
    found += names_say_something(others)
    print("\n".join(sorted(found)) or "the house is in order")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
