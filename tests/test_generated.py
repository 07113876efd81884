"""The generated pages are current, and say what the source and docs/claims.json say."""

import subprocess
import sys
from pathlib import Path

import docs as generated
from house import ROOT, Module

ROOM = '''"""Runs things."""
from turnout.run.sort import LIMIT, Box, Pair, sort
__all__ = ["LIMIT", "Box", "Pair", "sort"]
'''
CODE = '''"""Sorted."""

# How many,
# at most.
LIMIT = 3


def sort(x: int, *, k: int = 2, **rest: str) -> int:
    """Sorts."""


class Box:
    """Holds."""

    def __init__(self, size: int = 1) -> None: ...

    def open(self, *keys: str) -> int:
        """Opens."""

    @property
    def full(self) -> bool:
        """Whether nothing more fits."""

    def _hidden(self) -> None:
        """Not public."""


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two."""

    left: int
    right: dict = dataclasses.field(default_factory=dict)
'''


def test_generated_pages_are_current() -> None:
    """docs/architecture.md, docs/api and docs/methods.md are what ``python scripts/docs.py`` writes now."""
    command = [sys.executable, str(ROOT / "scripts" / "docs.py"), "--check"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_claim_is_in_the_table() -> None:
    """A method works when its paper's result is seen here: docs/claims.json holds every claim, measured."""
    from turnout import claims

    table = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    missing = [name for name in claims.__all__ if f"| `{name}` |" not in table]
    assert not missing, f"{missing}: run {generated.VERIFY}, then python scripts/docs.py"


def test_pages_say_what_the_source_says() -> None:
    """Signatures, first lines and links come from the source alone."""
    pages = generated.pages([Module("turnout/run/__init__.py", ROOM), Module("turnout/run/sort.py", CODE)], [])
    assert pages["docs/api/run.md"].splitlines()[1:] == [
        "# `turnout.run`",
        "",
        "Runs things.",
        "",
        "- [`LIMIT`](../../turnout/run/sort.py): How many, at most.",
        "- [`Box`](../../turnout/run/sort.py)`(size: int = 1)`: Holds.",
        "  - `.open(*keys: str) -> int`: Opens.",
        "  - `.full`: Whether nothing more fits.",
        "- [`Pair`](../../turnout/run/sort.py)`(left: int, right: dict = {})`: Two.",
        "- [`sort`](../../turnout/run/sort.py)`(x: int, *, k: int = 2, **rest: str) -> int`: Sorts.",
    ]
    assert "| 2 | [`run`](api/run.md) | Runs things. |" in pages["docs/architecture.md"]
    assert "\n    sort.py  Sorted.\n" in pages["docs/architecture.md"]


def test_drift_is_seen(tmp_path: Path) -> None:
    """A page edited by hand, a page of a room that is gone, and a page that is missing."""
    pages = generated.pages([Module("turnout/run/__init__.py", ROOM), Module("turnout/run/sort.py", CODE)], [])
    for name, text in pages.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    assert generated.drift(tmp_path, pages) == {}
    (tmp_path / "docs" / "api" / "gone.md").write_text("an old room", encoding="utf-8")
    (tmp_path / "docs" / "methods.md").write_text("edited by hand", encoding="utf-8")
    (tmp_path / "docs" / "architecture.md").unlink()
    assert list(generated.drift(tmp_path, pages)) == [
        "docs/api/gone.md",
        "docs/architecture.md",
        "docs/methods.md",
    ]


def test_table_of_claims() -> None:
    """The numbers of docs/claims.json, rounded; a claim that does not hold says so."""
    row = {"metric": "MaxVio", "relation": "below", "measured": [0.1, 0.2, 0.3], "control": [1.0, 1.0, 1.0]}
    row |= {"against": "bias off", "bound": None, "spread": 0.1234567, "holds": False}
    bits = row | {"metric": "bits", "relation": "no_worse", "difference": 0.01, "margin": 0.2, "why": "a step's worth"}
    bits |= {"headline": True, "holds": True}
    claim = {"name": "loss_free", "statement": "Even | free.", "source": "Wang et al., 2024", "evidence": [row, bits]}
    claim |= {"note": "2 layers", "off": "no update", "seconds": 61.2, "holds": False}
    text = generated.methods({"claims": [claim], "torch": "2.13.0"})
    cells = "MaxVio | 0.2 ± 0.1 | bias off | 1 ± 0 | below, by more than 0.1235 | **no** |\n"
    assert f"| `loss_free` | Wang et al., 2024 | Even \\| free. | {cells}" in text
    assert "| bits (headline) | 0.2 ± 0.1 |" in text
    assert "| no worse: 0.01 + 0.1235 at most 0.2, a step's worth | yes |\n" in text
    assert "- `loss_free`: off is no update. 2 layers; 61 s.\n" in text
    assert "- torch: 2.13.0\n" in text
