"""Turnout: networks that run only part of themselves.

A network is a set of paths; a policy decides which of them run; a backend runs the decision at full speed.
Names and rooms load on first use, so that ``import turnout`` touches neither torch nor any optional dependency.
"""

import importlib
import sys
from typing import TYPE_CHECKING

from turnout.moved import Finder

__version__ = "0.2.0"

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
    "generate": "turnout.models",
    "release": "turnout.reshape",
}
# What is there as ``turnout.room`` too, after ``import turnout`` alone.
_ROOMS = (
    "claims cli decide errors expects fields hub layers measure models moved paths reading recipes reshape run serve"
    " show solve storage train types wrappers"
).split()

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
    "generate",
    "release",
]

if Finder not in sys.meta_path:  # as it is when this is loaded again
    sys.meta_path.append(Finder)  # what moved is found by its old name for one release


if TYPE_CHECKING:  # the same, for editors and type checkers; tests/test_exports.py compares them
    from turnout import claims as claims
    from turnout import cli as cli
    from turnout import decide as decide
    from turnout import errors as errors
    from turnout import expects as expects
    from turnout import fields as fields
    from turnout import hub as hub
    from turnout import layers as layers
    from turnout import measure as measure
    from turnout import models as models
    from turnout import moved as moved
    from turnout import paths as paths
    from turnout import reading as reading
    from turnout import recipes as recipes
    from turnout import reshape as reshape
    from turnout import run as run
    from turnout import serve as serve
    from turnout import show as show
    from turnout import solve as solve
    from turnout import storage as storage
    from turnout import train as train
    from turnout import types as types
    from turnout import wrappers as wrappers
    from turnout.errors import TurnoutError
    from turnout.models import generate
    from turnout.reshape import adopt, release
    from turnout.types import Budget, Cost, ExpertWeights, Report, Routing, Trace
else:

    def __getattr__(name: str) -> object:
        if name in _HOME:
            return getattr(importlib.import_module(_HOME[name]), name)
        if name in _ROOMS:
            return importlib.import_module(f"turnout.{name}")
        raise AttributeError(f"module 'turnout' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *_ROOMS])
