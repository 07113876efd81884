"""Turnout: networks that run only part of themselves.

A network is a set of paths; a policy decides which of them run; a backend runs the decision at full speed.
Names load on first use, so that ``import turnout`` touches neither torch nor any optional dependency.
"""

import importlib
import sys

from turnout.moved import Finder

__version__ = "0.1.0"

# The public names of the package, each with the room it lives in. This import line is the registry.
_HOME = {
    "Budget": "turnout.types",
    "Cost": "turnout.types",
    "ExpertWeights": "turnout.types",
    "Report": "turnout.types",
    "Routing": "turnout.types",
    "Trace": "turnout.types",
    "TurnoutError": "turnout.errors",
    "adopt": "turnout.reshape",
    "release": "turnout.reshape",
}

__all__ = [
    "Budget",
    "Cost",
    "ExpertWeights",
    "Report",
    "Routing",
    "Trace",
    "TurnoutError",
    "__version__",
    "adopt",
    "release",
]

sys.meta_path.append(Finder)  # what moved is found by its old name for one release


def __getattr__(name: str) -> object:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'turnout' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
