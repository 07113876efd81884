"""Parts of torch that tests compare with are never missed in silence, and no test changes what others run by."""

import re
from pathlib import Path

import pytest
from private import private


def test_what_torch_has_no_more_is_a_failure_that_names_it():
    assert private("torch.nn").__name__ == "torch.nn"
    with pytest.raises(pytest.fail.Exception, match=r"torch [0-9.]+.* has no torch\._gone, with which this test"):
        private("torch._gone")


def test_no_test_changes_the_clock_of_every_thread():
    """A server of other tests would sleep by it: ``set_clock`` of tests/clocks.py changes it for one module."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    changed = re.compile(r"setattr\((\w+\.)?time,.*|setattr\(.*\btime\.\w+\".*|patch\(\"time\..*")
    assert changed.search('monkeypatch.setattr(time, "sleep", x)') and changed.search('setattr("a.b.time.sleep", x)')
    found = [f"{f}: {one[0]}" for f in files if f != Path(__file__) for one in changed.finditer(f.read_text())]
    assert len(files) > 100 and not found, found


def test_no_test_is_skipped_where_a_part_of_torch_is_missing():
    files = sorted(Path(__file__).parent.rglob("*.py"))
    found = [f"{f}: {line}" for f in files for line in re.findall(r"importorskip\([\"']torch\b.*", f.read_text())]
    assert len(files) > 100 and not found, found
