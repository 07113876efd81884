"""How a claim's mechanism is broken in one line of code, and what is then seen of it."""

import dataclasses
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest


@dataclasses.dataclass(frozen=True)
class Case:
    """How a claim's mechanism is broken, at what scale, and what is seen of it.

    ``seen``: the arm is "equal" to the off arm to the last digits, "near" it (within a twentieth), or "lost" at least
    half of what the whole mechanism gains over it.
    """

    broken: Callable[[pytest.MonkeyPatch], None]
    seen: Literal["equal", "near", "lost"] = "equal"
    pairs: dict[str, str] | None = None  # measured -> what it is like now; the claim's own unless said
    small: dict[str, object] = dataclasses.field(default_factory=dict)
    taught: int = 0  # steps of the models that exist already, where the claim changes such


def family(name: str) -> dict[str, Case]:
    """The ``CASE`` of every file in tests/claims/<family>, by the claim's name, which is the file's."""
    found = {}
    for path in sorted((Path(__file__).parent / name).glob("*.py")):
        spec = importlib.util.spec_from_file_location(f"broken_{name}_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = module.CASE
    return found
