"""What is public is said in three places that agree: a room's ``__all__``, docs/api and the changelog."""

import importlib
import re
import subprocess
import sys

import pytest

import turnout
from house import ROOT, Module, imported_for_checkers, listed, read

MODULES = read()
ROOMS = [module for module in MODULES if module.is_public]
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def names_documented(room: str) -> dict[str, list[str]]:
    """The names on a page of docs/api, by the heading of the module that holds them."""
    page = (ROOT / "docs" / "api" / f"{room}.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for heading, name in re.findall(r"^##? `(turnout[\w.]+)`|^- \[`(\w+)`\]", page, re.MULTILINE):
        if heading:
            found[heading] = []
        else:
            found[list(found)[-1]].append(name)
    return found


def is_floor(module: Module) -> bool:
    """Whether a package is a floor of its room: every name of it is the room's too."""
    room = next(other for other in ROOMS if other.name == f"turnout.{module.room}")
    names = listed(module) or []
    return module is not room and names != [module.name.rpartition(".")[2]] and {*names} <= {*(listed(room) or [])}


@pytest.mark.parametrize("module", ROOMS, ids=lambda module: module.name)
def test_docs_list_the_room(module: Module) -> None:
    """docs/api/<room>.md has every public name and no other, each once; scripts/docs.py writes it."""
    here = {other.name for other in ROOMS if other.name.startswith(f"{module.name}.") and is_floor(other)}
    page = names_documented(module.room)
    below = {name for floor in here for name in page[floor]}
    assert page.get(module.name) == [name for name in listed(module) or [] if name not in below]


def test_docs_have_no_other_rooms() -> None:
    """A room that is gone takes its page with it."""
    pages = {path.stem for path in (ROOT / "docs" / "api").glob("*.md")}
    assert pages == {module.room for module in ROOMS}


@pytest.mark.parametrize("module", [one for one in ROOMS if not is_floor(one)], ids=lambda module: module.name)
def test_changelog_names_the_room(module: Module) -> None:
    """Every public name stands in CHANGELOG.md, in the entry of its own room, in backticks."""
    entries = re.findall(rf"^- `{re.escape(module.name)}`:(.*?)(?=^- |^#|\Z)", CHANGELOG, re.MULTILINE | re.DOTALL)
    said = set(re.findall(r"`(\w+)`", " ".join(entries)))
    packages = {other.name for other in ROOMS}  # they have entries of their own
    assert {name for name in listed(module) or [] if f"{module.name}.{name}" not in packages} <= said


@pytest.mark.parametrize("module", ROOMS, ids=lambda module: module.name)
def test_names_are_importable(module: Module) -> None:
    """``from turnout.room import name`` works for every name of ``__all__``."""
    room = importlib.import_module(module.name)
    assert [name for name in listed(module) or [] if not hasattr(room, name)] == []


def test_package_names_are_the_rooms_names() -> None:
    """The names that ``turnout`` loads on first use are public where they live, and all of them are listed."""
    assert turnout.__all__ == sorted([*turnout._HOME, "__version__"])
    for name, home in turnout._HOME.items():
        room = importlib.import_module(home)
        assert name in room.__all__
        assert getattr(turnout, name) is getattr(room, name)


def test_every_room_is_an_attribute_of_the_package() -> None:
    """``import turnout; turnout.reshape`` works, and so does what completes names."""
    assert sorted({module.room for module in ROOMS}) == turnout._ROOMS
    code = "import turnout; assert all(hasattr(turnout, name) for name in dir(turnout)); print(*dir(turnout))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == sorted([*turnout.__all__, *turnout._ROOMS])


def test_checkers_are_shown_what_is_there() -> None:
    """Under ``TYPE_CHECKING`` stand the names and rooms that load on first use, each from where it lives."""
    (package,) = (module for module in MODULES if module.name == "turnout")
    shown = sorted(target for _, target in imported_for_checkers(package))
    names = [f"{home}.{name}" for name, home in turnout._HOME.items()]
    assert shown == sorted([*names, *(f"turnout.{room}" for room in turnout._ROOMS)])


def test_an_unknown_package_name_says_so() -> None:
    """Python's own message, so that ``hasattr`` and ``from turnout import`` work."""
    with pytest.raises(AttributeError, match="no attribute 'Rooting'"):
        turnout.Rooting  # noqa: B018


def test_version_is_the_changelogs() -> None:
    """The newest release in the changelog is the package's version; before the first release there is none."""
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", CHANGELOG, re.MULTILINE)
    assert released[:1] in ([], [turnout.__version__])
    assert "## [Unreleased]" in CHANGELOG
