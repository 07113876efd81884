"""Another clock for one module: who replaces a function of ``time`` itself changes it for every thread that runs."""

import time
import types
from typing import Any


def set_clock(monkeypatch: Any, module: Any, **functions: Any) -> None:
    """Until the test's end the module finds other functions in ``time``; a server of other tests does not."""
    monkeypatch.setattr(module, "time", types.SimpleNamespace(**vars(time) | functions))
