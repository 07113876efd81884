"""What moved is found by its old name, with a warning; what stands in a room under that name stays."""

import importlib
import pickle
import subprocess
import sys
import types

import pytest

import turnout
from house import ROOT, read
from turnout import moved

OLD = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    from turnout.reshape.attach import attach
    import turnout.measure.page
    from turnout.measure import report_html
    from turnout.train.federated import federate
    import turnout.reshape
assert turnout.reshape.attach is attach, "the module took the function's place"
import turnout.show.run
assert report_html is turnout.show.run.report_html
print(*dict.fromkeys(str(one.message) + " " + one.filename for one in said), sep="\\n")
"""


@pytest.mark.parametrize("old", moved.MODULES)
def test_an_old_module_is_the_new_one_and_says_so(old: str) -> None:
    with pytest.warns(FutureWarning, match=moved.MODULES[old]):
        sys.modules.pop(old, None)
        found = importlib.import_module(old)
    assert found is importlib.import_module(moved.MODULES[old])
    room, _, name = old.rpartition(".")
    here = getattr(importlib.import_module(room), name)
    listed = name in importlib.import_module(room).__all__
    assert here is found if not listed else not isinstance(here, types.ModuleType)


@pytest.mark.parametrize(("room", "name"), [(room, name) for room, names in moved.NAMES.items() for name in names])
def test_an_old_name_is_the_new_one_and_says_so(room: str, name: str) -> None:
    with pytest.warns(FutureWarning, match=f"{moved.NAMES[room][name]}.{name}"):
        found = getattr(importlib.import_module(room), name)
    assert found is getattr(importlib.import_module(moved.NAMES[room][name]), name)


def test_every_module_of_the_release_before_is_there_or_moved() -> None:
    """The list is of 0.1 as it last was, before anything moved; a file that moves next is in it too."""
    before = (ROOT / "tests" / "modules_of_0.1.txt").read_text(encoding="utf-8").split()
    now = {module.name for module in read()}
    assert len(before) > 200 and moved.MODULES.keys() <= {*before}
    assert not [name for name in before if name not in now and name not in moved.MODULES]


@pytest.mark.parametrize("old", moved.MODULES)
def test_an_old_module_is_an_attribute_of_its_room(old: str) -> None:
    """As it was where the room alone was imported; a function of that name goes before it."""
    room, _, name = old.rpartition(".")
    module = importlib.import_module(room)
    if name in module.__all__:
        return
    vars(module).pop(name, None)  # which an import of it before has left there
    with pytest.warns(FutureWarning, match=moved.MODULES[old]):
        assert getattr(module, name) is importlib.import_module(moved.MODULES[old])


def test_a_class_is_found_by_what_a_saved_object_calls_it() -> None:
    """A model with adapters, saved whole by 0.1, names ``turnout.reshape.live.Living``, where a floor is now."""
    held = turnout.reshape.adapters.host.Living
    saved = b"cturnout.reshape.live\nLiving\n."
    with pytest.warns(FutureWarning, match="host.Living"):
        assert pickle.loads(saved) is held


def test_loading_the_package_again_adds_no_second_finder() -> None:
    importlib.reload(turnout)
    assert sys.meta_path.count(moved.Finder) == 1


def test_what_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("turnout.reshape.no_such_file")
    with pytest.raises(AttributeError, match="no_such_name"):
        turnout.measure.no_such_name  # noqa: B018


def test_from_a_users_file_the_warning_names_that_file(tmp_path) -> None:
    script = tmp_path / "mine.py"
    script.write_text(OLD)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all(line.endswith(str(script)) for line in lines), done.stdout


def test_the_old_names_go_with_the_release_that_the_warning_names() -> None:
    now = tuple(int(part) for part in turnout.__version__.split(".")[:2])
    assert now < tuple(int(part) for part in moved.UNTIL.split(".")), "turnout/moved.py has done its work: delete it"
