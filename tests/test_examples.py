"""The examples run, each in a process of its own, and print what examples/README.md shows.

Whole numbers are as shown; where a number has a decimal point another machine may differ a little.
"""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from house import ROOT

FOLDER = ROOT / "examples"
README = (FOLDER / "README.md").read_text(encoding="utf-8")
SHOWN = dict(re.findall(r"^## \[(\w+\.py)\].*?^```text\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL))
NUMBER = re.compile(r"\d+(?:\.\d+)?")
SCRIPTS = sorted(FOLDER.glob("*.py"))


def differs(shown: str, printed: str) -> str:
    """The first line that is not as shown; empty when all are."""
    left, right = shown.splitlines(), printed.splitlines()
    for number in range(max(len(left), len(right))):
        one, two = (lines[number].rstrip() if number < len(lines) else "(nothing)" for lines in (left, right))
        same = NUMBER.sub("#", one) == NUMBER.sub("#", two)
        if not same or not all(map(close, NUMBER.findall(one), NUMBER.findall(two))):
            return f"line {number + 1}: shown {one!r}, printed {two!r}"
    return ""


def close(shown: str, printed: str) -> bool:
    """Whole numbers are equal; of others the digits may differ by a quarter, or by a tenth where they are small."""
    if "." not in shown:
        return shown == printed
    return math.isclose(float(shown), float(printed), rel_tol=0.25, abs_tol=0.1)


def test_every_example_is_shown_and_short() -> None:
    """Each has its section with what it prints, in the order of the page's table; none is long."""
    assert sorted(SHOWN) == [script.name for script in SCRIPTS]
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        assert text.startswith('"""') and text.count("\n") < 60, script.name
        assert f"]({script.name})" in README


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_example_prints_what_is_shown(script: Path, tmp_path: Path) -> None:
    """In an empty folder, without a network."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], check=False, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not differs(SHOWN[script.name], done.stdout), f"{differs(SHOWN[script.name], done.stdout)}\n{done.stdout}"
    assert not list(tmp_path.iterdir()), "an example leaves nothing where it is run"


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a 1\nb 2.00", "a 1\nb 2.10", True),
        ("a 1", "a 2", False),
        ("loss 2.00", "loss 4.00", False),
        ("a\nb", "a", False),
        ("a", "a\nb", False),
        ("equal: True", "equal: False", False),
    ],
)
def test_what_counts_as_the_same(shown: str, printed: str, same: bool) -> None:
    """The comparison itself can fail."""
    assert (not differs(shown, printed)) is same
