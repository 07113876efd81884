"""The documentation is true: what its pages show is run or checked, and every link leads somewhere.

The word after a fence's three backticks says what happens to the block; GitHub shows only its highlighting:

    python        runs; all blocks of a page share one namespace and one temporary folder, from top to bottom
    console       the lines that begin with "$ " run there too, and what they print must be what the page shows
                  ("..." stands for anything)
    sh            runs there in CI only, for commands that take seconds; everywhere, every command and its arguments
                  are checked against the command line's own parser
    text, json... are shown, nothing more

A second word changes that: "slow" leaves a python or console block to CI; "not-run" leaves an sh or python block
unrun, for what takes minutes or a network, but it is still checked.
"""

import ast
import contextlib
import dataclasses
import doctest
import importlib
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from house import ROOT
from turnout.cli.main import COMMANDS, build_parser

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs" / "guides").glob("*.md"))]
SHOWN = {"text", "json", "toml", "yaml", "html", "diff"}
MEANINGS = {("python",), ("python", "slow"), ("python", "not-run"), ("console",), ("console", "slow"), ("sh",)}
MEANINGS |= {("sh", "not-run"), *((word,) for word in SHOWN)}
# Commands of a page that are not ours; another one is probably a slip.
SHELL = set("cat cd cmp cp curl echo export git head kill ls mkdir mv printf rm sh sleep source tail test wc".split())


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block: the words after its backticks, the line its text starts on, and the text."""

    words: tuple[str, ...]
    line: int
    text: str

    @property
    def quick(self) -> bool:
        """Whether it runs wherever the tests do."""
        return self.words in (("python",), ("console",))

    @property
    def runs(self) -> bool:
        """Whether it runs at all."""
        return self.words[0] in ("python", "console", "sh") and "not-run" not in self.words


def blocks(text: str) -> list[Block]:
    """The fenced blocks of a page."""
    found, lines = [], text.splitlines()
    start: int | None = None
    for number, line in enumerate(lines):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
        else:
            indent = len(lines[start]) - len(lines[start].lstrip())
            body = "\n".join(row[indent:] for row in lines[start + 1 : number])
            found.append(Block(tuple(lines[start].strip("` ").split()), start + 2, body + "\n"))
            start = None
    return found


def run_block(block: Block, page: str, namespace: dict[str, object], folder: Path) -> None:
    """Runs one block where its page runs; an exception, or another output than the page shows, fails."""
    where = f"{page}:{block.line}"
    if block.words[0] == "python" and ">>> " in block.text:
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        example = doctest.DocTestParser().get_doctest(block.text, namespace, where, page, block.line - 1)
        report = io.StringIO()
        runner.run(example, out=report.write, clear_globs=False)
        namespace |= example.globs
        assert not runner.summarize(verbose=False).failed, report.getvalue()
    elif block.words[0] == "python":
        # Empty lines before the code make a traceback name the page's own line.
        exec(compile("\n" * (block.line - 1) + block.text, page, "exec"), namespace)
    elif block.words[0] == "sh":
        shell(block.text, folder, where)
    else:
        for command, shown in sessions(block.text):
            printed = shell(command, folder, where)
            checker = doctest.OutputChecker()
            same = checker.check_output(shown, printed, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
            assert same, f"{where}: {command}\nthe page shows:\n{shown}\nit prints:\n{printed}"


def shell(commands: str, folder: Path, where: str) -> str:
    """What the commands print; the commands of this Python's environment come first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "COLUMNS": "100", "NO_COLOR": "1"}
    done = subprocess.run(
        ["sh", "-euc", commands], check=False, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{where}: exit code {done.returncode} of:\n{commands}\n{done.stdout}{done.stderr}"
    return done.stdout


def sessions(text: str) -> list[tuple[str, str]]:
    """The commands of a console block, each with the output shown below it."""
    parts = re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]
    return [(part.partition("\n")[0], part.partition("\n")[2]) for part in parts]


def commands(text: str) -> Iterator[list[str]]:
    """The commands of some lines of shell, as words, without redirections and settings of variables."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        skip = False
        for word in [*words, ";"]:
            if word in (";", "&&", "||", "|", "&"):
                if command:
                    yield command
                command = []
            elif skip or set(word) <= set("<>&"):
                skip = not skip
            elif command or not re.match(r"^\w+=", word):
                command.append(word)


def check_command(command: list[str]) -> str | None:
    """What is wrong with a command of ours, without running it; None when nothing is."""
    name, arguments = command[0].removeprefix(".venv/bin/"), command[1:]
    if name == "pip":
        extras = re.findall(r"\.\[([\w,]+)\]", " ".join(arguments))
        known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
        strange = [extra for extra in ",".join(extras).split(",") if extra and extra not in known]
        return f"there is no extra {strange[0]}" if strange else None
    if name in SHELL or name == ".":
        return None
    if name.startswith(("scripts/", ".ci/")):
        return None if os.access(ROOT / name, os.X_OK) else f"{name} is no script of ours"
    if name == "torchrun":
        inner = arguments.index("turnout") if "turnout" in arguments else 0
        whole = arguments[inner - 1 : inner] == ["-m"]
        return check_turnout(arguments[inner + 1 :]) if whole else "torchrun starts -m turnout here"
    if name in ("python", "python3", "python3.11"):
        if arguments[:1] == ["-m"]:
            return None if importlib.util.find_spec(arguments[1]) else f"there is no module {arguments[1]}"
        there = not arguments or arguments[0].startswith("-") or (ROOT / arguments[0]).exists()
        return None if there else f"{arguments[0]} is not in the repository"
    return check_turnout(arguments) if name == "turnout" else f"{name!r} is not a command known here"


def check_turnout(arguments: list[str]) -> str | None:
    """What ``turnout`` would say against these arguments: options, recipes, fields and claims are looked up."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parsed = build_parser().parse_args(arguments)
    except SystemExit as stop:
        return said.getvalue() if stop.code else None
    try:
        if parsed.command == "train" and parsed.recipe and "=" not in parsed.recipe:
            from turnout import recipes

            recipes.find(parsed.recipe).scaled(parsed.overrides)
        if parsed.command == "verify":
            from turnout import claims

            for claim in parsed.names:
                claims.find(claim)
    except ValueError as error:
        return str(error)
    return None


def problems(text: str) -> list[str]:
    """What is wrong with a page's blocks before any of them runs."""
    found = []
    for block in blocks(text):
        if block.words not in MEANINGS:
            found.append(
                f"line {block.line - 1}: a fence says one of the words in tests/test_docs.py, not {block.words}"
            )
        elif block.words[0] == "python" and ">>> " not in block.text:
            ast.parse(block.text)
        elif block.words[0] in ("sh", "console"):
            console = "\n".join(command for command, _ in sessions(block.text))
            for command in commands(console if block.words[0] == "console" else block.text):
                if problem := check_command(command):
                    found.append(f"line {block.line}: {shlex.join(command)}: {problem}")
    return found


def run_page(text: str, page: str, folder: Path, *, whole: bool) -> int:
    """Runs the blocks of a page in order, the quick ones or all; returns how many."""
    chosen = [block for block in blocks(text) if block.quick or (whole and block.runs)]
    namespace: dict[str, object] = {"__name__": "__main__"}
    with contextlib.chdir(folder):
        for block in chosen:
            run_block(block, page, namespace, folder)
    return len(chosen)


# ---- the pages


def page_name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page_is_sound(page: Path) -> None:
    """Every fence says what it is; every command exists and takes the arguments shown."""
    assert not problems(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page_runs(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The quick blocks; where slow tests run too, the page's whole run has them."""
    if "not slow" not in request.config.getoption("markexpr") and not is_quick(page):
        pytest.skip("test_whole_page_runs runs all of this page")
    run_page(page.read_text(encoding="utf-8"), str(page), tmp_path, whole=False)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_whole_page_runs(page: Path, tmp_path: Path) -> None:
    """All blocks, in the page's order."""
    if is_quick(page):
        pytest.skip("every block of this page is quick: test_page_runs has run it")
    run_page(page.read_text(encoding="utf-8"), str(page), tmp_path, whole=True)


def is_quick(page: Path) -> bool:
    return all(block.quick or not block.runs for block in blocks(page.read_text(encoding="utf-8")))


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help_examples_are_true(name: str) -> None:
    """The examples that ``--help`` shows are commands that the parser takes."""
    text = importlib.import_module(f"turnout.cli.{name.replace('-', '_')}").__doc__ if name else build_parser().epilog
    examples = [line.strip() for line in (text or "").splitlines() if line.startswith("  turnout ")]
    assert examples
    for example in examples:
        command = next(commands(re.split(r"\s{2,}", example)[0].replace("COMMAND", "train")))
        assert check_command(command) is None, example


def test_links_lead_somewhere() -> None:
    """Every relative link of every page names a file that is there."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").glob("*.md")]
    broken = [
        f"{page_name(page)}: {link}" for page in pages for link in links(page) if not (page.parent / link).exists()
    ]
    assert len(pages) > 5 and not broken


def links(page: Path) -> list[str]:
    """The relative links of a page, without their anchors."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return [link for link in re.findall(r"\]\(([^)#\s]+)", text) if not re.match(r"\w+:", link)]


# ---- the checks themselves can fail


@pytest.mark.parametrize(
    ("page", "says"),
    [
        ("```\nx\n```\n", "not ()"),
        ("```pyhton\nx\n```\n", "not ('pyhton',)"),
        ("```sh\nturnout trian tiny\n```\n", "invalid choice"),
        ("```sh\nturnout sample runs/x --promt hello\n```\n", "unrecognized arguments"),
        ("```sh\nturnout train tinny --out runs/x\n```\n", "Did you mean 'tiny'"),
        ("```sh\ntorchrun --nproc-per-node 2 -m turnout train tiny --layuot ep=2\n```\n", "unrecognized arguments"),
        ("```sh\ntorchrun --nproc-per-node 2 train.py\n```\n", "torchrun starts -m turnout here"),
        ("```sh\nturnout train tiny widht=3 --out runs/x\n```\n", "widht"),
        ("```sh not-run\nscripts/dmeo\n```\n", "no script of ours"),
        ("```sh\necho done && frobnicate\n```\n", "'frobnicate' is not a command"),
        ("```sh\npython examples/gone.py\n```\n", "not in the repository"),
        ("```console\n$ turnout methods --frob\nout\n```\n", "unrecognized arguments"),
    ],
)
def test_unsound_page_is_caught(page: str, says: str) -> None:
    """One problem, told with its line."""
    assert [says in problem for problem in problems(page)] == [True]


@pytest.mark.parametrize(
    "page",
    [
        "```python\nassert False\n```\n",
        "```python\n>>> 1 + 1\n3\n```\n",
        "```console\n$ echo hello\ngoodbye\n```\n",
        "```console\n$ false\n```\n",
        "```sh\nfalse; true\n```\n",
    ],
)
def test_failing_page_fails(page: str, tmp_path: Path) -> None:
    """A page that shows what is not so."""
    with pytest.raises(AssertionError):
        run_page(page, "page.md", tmp_path, whole=True)


def test_blocks_of_a_page_share_their_folder_and_names(tmp_path: Path) -> None:
    """From top to bottom; CI's blocks stay out of the quick run."""
    page = "```python\nimport pathlib\npathlib.Path('a').write_text('1')\nx = 2\n```\n\n```console\n$ cat a\n1\n```\n\n"
    page += "- in a list:\n\n  ```python\n  assert x == 2\n  ```\n\n```sh\nLIMIT=1 sleep 0 > log && cp a b\n```\n"
    page += "```python\n>>> x\n2\n>>> list(range(30))\n[0, ..., 29]\n```\n\n```text\nnot run\n```\n\n"
    page += "```sh not-run\ngit clone no-such-place\n```\n"
    assert problems(page) == []
    assert run_page(page, "page.md", tmp_path, whole=False) == 4
    assert not (tmp_path / "b").exists()
    assert run_page(page, "page.md", tmp_path, whole=True) == 5
    assert (tmp_path / "b").read_text() == "1"
