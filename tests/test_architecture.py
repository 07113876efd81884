"""The house is in order: every rule of scripts/house.py holds for every file of turnout."""

import tomllib

import pytest

from house import ROOT, RULES, names_say_something, read

MODULES = read()


def test_there_is_a_house_to_check() -> None:
    """An empty list of modules would break no rule."""
    assert {"turnout", "turnout.types", "turnout.cli.main"} <= {module.name for module in MODULES}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule(rule) -> None:
    """The rule's docstring says what it asks; each line of the failure says where."""
    broken = list(rule(MODULES))
    assert not broken, "\n".join([f"{rule.__name__}: {rule.__doc__}", *broken])


@pytest.mark.parametrize("folder", ["tests", "scripts", "examples", "benchmarks"])
def test_names_outside_the_package(folder: str) -> None:
    """What stands beside turnout is named as plainly as what is in it."""
    assert not list(names_say_something(read(ROOT, folder)))


def test_every_file_is_packaged() -> None:
    """What is not Python (a style sheet, a type marker) is installed only where pyproject.toml says so."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    data = project["tool"]["setuptools"]["package-data"]
    packages = {name: ROOT / name.replace(".", "/") for name in data}
    packaged = {
        path for name, patterns in data.items() for pattern in patterns for path in packages[name].glob(pattern)
    }
    files = {path for path in (ROOT / "turnout").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert {path for path in files if path.suffix != ".py"} == packaged
