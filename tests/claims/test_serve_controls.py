"""Parts of the claims on serving, each broken by itself: the row that is about it sees it."""

import contextlib
import importlib
from typing import Any

import numpy as np
import pytest


def room(name: str) -> Any:
    return importlib.import_module(f"turnout.claims.serve.{name}")


def test_a_cache_that_cannot_fall_back_is_misled(monkeypatch: pytest.MonkeyPatch) -> None:
    module, follow = room("few_predictions"), room("few_predictions").follow
    monkeypatch.setattr(module, "_REQUESTS", 1500)

    def misled() -> dict[str, float]:
        return module._misled(np.random.default_rng(0), 0)

    whole = misled()
    monkeypatch.setattr(module, "follow", lambda page_T, **how: follow(page_T, **(how | {"robust": False})))
    broken = misled()
    assert whole["misled"] < 0.8 * whole["misled, blind"]
    assert broken["misled"] == broken["misled, blind"] == whole["misled, blind"]


def test_products_as_usual_are_told_from_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a limit, so that nothing else is seen than how rows are rounded."""
    module = room("buffer_overflow")
    whole = module._by_rounding(0)
    assert whole["tiles"] == 0 < whole["usual"]
    monkeypatch.setattr(module, "batch_invariant", contextlib.nullcontext)
    assert module._by_rounding(0)["tiles"] == whole["usual"]
