"""Starting is light: counted in modules, since a clock says more about the machine than about the code."""

import json
import subprocess
import sys

import pytest

from turnout.cli.main import COMMANDS


def loaded_by(code: str) -> set[str]:
    """The modules that a fresh interpreter loads for this code, beyond those it starts with."""
    program = f"""
import json, sys
before = set(sys.modules)
try:
    {code}
except SystemExit:
    pass
print(json.dumps(sorted(set(sys.modules) - before)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(json.loads(done.stderr.splitlines()[-1]))


def outside(modules: set[str]) -> set[str]:
    """The libraries among these modules that do not come with Python."""
    return {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) - {"turnout"}


def test_counting_sees_what_is_loaded() -> None:
    """The measure itself: a heavy import is seen."""
    assert "numpy" in outside(loaded_by("import numpy"))


def test_import_turnout_loads_nothing_else() -> None:
    """Two modules of ours and a handful of Python's own: far below 0.3 s on any machine."""
    modules = loaded_by("import turnout")
    assert {name for name in modules if name.startswith("turnout")} == {"turnout", "turnout.moved"}
    assert not outside(modules)
    assert len(modules) <= 10, sorted(modules)


def test_names_load_on_first_use() -> None:
    """Asking for a name loads its room; asking what there is does not."""
    assert "torch" not in outside(loaded_by("import turnout; dir(turnout)"))
    assert "torch" in outside(loaded_by("import turnout; turnout.Routing"))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)], ids=" ".join
)
def test_help_is_instant(arguments: list[str]) -> None:
    """Help reads the command line's own modules and Python's, no library."""
    modules = loaded_by(f"from turnout.cli import main; main({arguments!r})")
    assert not outside(modules)
    assert len(modules) <= 150, sorted(modules)


def test_python_m_turnout_is_turnout() -> None:
    """Both spellings print the same help."""
    command = [sys.executable, "-m", "turnout", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: turnout ")
    assert all(name in done.stdout for name in COMMANDS)
