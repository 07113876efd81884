"""What users write is known to their checkers: the guides' code and the examples pass mypy and pyright, both strict."""

import ast
import doctest
import importlib.metadata
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from house import ROOT, Function, Module, listed, locate, read
from tests.test_docs import PAGES, Block, blocks

# Their own types do not hold under strict: every settings dict of the guides would be an error of theirs.
UNTYPED = ("transformers", "peft")
# What torch itself leaves untyped, by the words of either checker.
TORCH = (
    r'^Type of "(manual_seed|backward|step)" is partially unknown',
    r'^Call to untyped function "(manual_seed|backward|step)" in typed context',
)

# What a user may count on.
SOUND = '''
from typing import assert_type

import torch
from torch import Tensor, nn

import turnout
from turnout.decide.token import TopK
from turnout.layers import MoE, Routed, Turnout
from turnout.models import LM, LMConfig, LMOutput
from turnout.paths import Bank


class Mine(nn.Linear):
    """A model."""


model, report = turnout.adopt(Mine(2, 2))
assert_type(model, Mine)
assert_type(report, turnout.Report)
assert_type(turnout.release(model)[0], Mine)
assert_type(turnout.reshape.attach(model, [])[0], Mine)
assert_type(turnout.reshape.average([model, model])[0], Mine)
router = TopK(8, 4, top_k=2)
assert_type(router(torch.zeros(3, 8)), turnout.Routing)
assert_type(Turnout(Bank(4, 8, 8), router)(torch.zeros(3, 8)), Routed)
routed = MoE(8, 8, 4, router=router)(torch.zeros(3, 8))
assert_type(routed.output, Tensor)
assert_type(routed.routing.load_E, Tensor)
lm = LM(LMConfig(vocab_size=16, width=8, layers=1, heads=1))
assert_type(lm(torch.zeros(1, 2, dtype=torch.long)), LMOutput)
assert_type(turnout.reshape.upcycle(lm, num_experts=2, top_k=1)[0], LM)


def bill(routing: turnout.Routing, cost: turnout.Cost) -> turnout.Budget | None:
    """Names of the package are types."""


try:
    turnout.run.choose(torch.zeros(3, 8), routed.routing, turnout.ExpertWeights(torch.zeros(1), torch.zeros(1)))
except turnout.TurnoutError:
    pass
'''
# Every line with a mark is an error to both checkers, and no other line is.
BROKEN = """
import torch

import turnout
from turnout.layers import MoE
from turnout.decide.token import TopK

turnout.adpot(torch.nn.Linear(2, 2))  # wrong
turnout.adopt("mixtral")  # wrong
turnout.reshapes  # wrong
turnout.reshape.atach  # wrong
turnout.measure.report_htm  # wrong
model, report = turnout.adopt(torch.nn.Linear(2, 2))
routed = MoE(8, 8, 4, router=TopK(8, 4))(torch.zeros(3, 8))
MoE(8, 8, 4, router=TopK(8, 4))("a text")  # wrong
routed.ouput  # wrong
number: int = routed.output  # wrong
TopK(8, 4)(torch.zeros(3, 8)).num_expert  # wrong
def bill(routing: turnout.Rooting) -> None: ...  # wrong
"""


class Said(NamedTuple):
    """One error of a checker."""

    file: str
    line: int
    text: str


def code(page: str) -> str:
    """The Python that a page runs, on the lines where it stands; what a session only shows is printed."""
    lines: list[str] = []
    for block in blocks(page):
        if block.words[:1] == ("python",) and block.runs:
            lines += [""] * (block.line - 1 - len(lines)) + statements(block)
    return "\n".join(lines) + "\n"


def statements(block: Block) -> list[str]:
    """The lines of a block, without the prompts and the output of a session."""
    if ">>> " not in block.text:
        return block.text.splitlines()
    lines = [""] * block.text.count("\n")
    for example in doctest.DocTestParser().get_examples(block.text):
        shown = example.source.rstrip("\n")
        shown = f"print({shown})" if example.want else shown
        lines[example.lineno : example.lineno + shown.count("\n") + 1] = shown.split("\n")
    return lines


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is checked: the pages' code, the two probes, and stubs for what has no types."""
    made = tmp_path_factory.mktemp("typed")
    for name in UNTYPED:
        stub = made / "stubs" / name / "__init__.pyi"
        stub.parent.mkdir(parents=True)
        stub.write_text("from typing import Any\n\ndef __getattr__(name: str) -> Any: ...\n", encoding="utf-8")
    checked = made / "checked"
    checked.mkdir()
    for page in PAGES:
        if "\n" != (text := code(page.read_text(encoding="utf-8"))):
            (checked / f"{page.stem.lower()}_page.py").write_text(text, encoding="utf-8")
    for example in (ROOT / "examples").rglob("*.py"):
        name = "_".join(example.relative_to(ROOT).with_suffix("").parts)
        (checked / f"{name}.py").write_bytes(example.read_bytes())
    (checked / "sound.py").write_text(SOUND, encoding="utf-8")
    (checked / "broken.py").write_text(BROKEN, encoding="utf-8")
    return made


def mypy(folder: Path) -> Iterator[Said]:
    """What ``mypy --strict`` says; as in an installed package, it is not asked about turnout itself."""
    settings = f"""
[mypy]
strict = true
allow_redefinition = true
mypy_path = {folder / "stubs"}:{ROOT}
cache_dir = {folder / "cache"}
[mypy-turnout.*]
ignore_errors = true
"""
    (folder / "mypy.ini").write_text(settings, encoding="utf-8")
    options = ["--config-file", folder / "mypy.ini", "--no-error-summary", "--show-absolute-path", "--no-pretty"]
    done = checker("mypy", *options, folder / "checked")
    assert not done.stderr, done.stderr
    for line in done.stdout.splitlines():
        if found := re.fullmatch(r"(.+?):(\d+): error: (.*)", line):
            yield Said(Path(found[1]).name, int(found[2]), found[3])


def pyright(folder: Path) -> Iterator[Said]:
    """What pyright says in strict mode."""
    settings = {"typeCheckingMode": "strict", "extraPaths": [str(ROOT)], "stubPath": str(folder / "stubs")}
    (folder / "checked" / "pyrightconfig.json").write_text(json.dumps(settings), encoding="utf-8")
    done = checker("pyright", "--outputjson", "--pythonpath", sys.executable, "--project", folder / "checked")
    for one in json.loads(done.stdout)["generalDiagnostics"]:
        yield Said(Path(one["file"]).name, one["range"]["start"]["line"] + 1, one["message"])


def checker(name: str, *options: object) -> subprocess.CompletedProcess[str]:
    importlib.metadata.version(name)  # says what is missing
    command = [sys.executable, "-m", name, *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=500)


@pytest.mark.slow
@pytest.mark.parametrize("check", [mypy, pyright])
def test_users_code_is_typed(check, folder: Path) -> None:
    """Strict, each checker once: no error in the guides, the examples and the probe, and every planted one found."""
    said = [one for one in check(folder) if not any(re.search(known, one.text) for known in TORCH)]
    planted = {number for number, line in enumerate(BROKEN.splitlines(), 1) if line.endswith("# wrong")}
    assert {one.line for one in said if one.file == "broken.py"} == planted
    others = [f"{one.file}:{one.line}: {one.text}" for one in said if one.file != "broken.py"]
    assert not others, "\n".join(others)


def test_a_call_gives_what_forward_gives() -> None:
    """A call of an ``nn.Module`` is Any to a checker: every public one with a ``forward`` is a ``Called``."""
    found = dict(public_modules({module.name: module for module in read()}))
    assert len(found) > 25
    assert [name for name, node in found.items() if "nn.Module" in map(ast.unparse, node.bases)] == []


def public_modules(table: dict[str, Module]) -> Iterator[tuple[str, ast.ClassDef]]:
    """The public classes that have a ``forward`` of their own, and are no interface."""
    for module in table.values():
        for name in listed(module) or [] if module.is_public else []:
            node = (locate(name, module, table) or (None, None))[1]
            if isinstance(node, ast.ClassDef) and "Protocol" not in map(ast.unparse, node.bases):
                if any(isinstance(part, Function) and part.name == "forward" for part in node.body):
                    yield name, node


def test_a_session_of_a_page_is_checked_as_statements() -> None:
    page = "one\n\n```python\n>>> x = [\n...     1,\n... ]\n>>> x\n[1]\n\n```\n\n```python not-run\ny\n```\n"
    assert code(page) == "\n\n\nx = [\n    1,\n]\nprint(x)\n\n\n"
