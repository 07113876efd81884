"""Live transformers models, changed in place: their experts run through turnout's executors, and back."""

from typing import TYPE_CHECKING

from turnout import moved
from turnout.reshape.live.adopt import adopt, register_backend, release

__all__ = [
    "adopt",
    "register_backend",
    "release",
]

if not TYPE_CHECKING:  # a checker would take every name for there

    def __getattr__(name: str) -> object:
        return moved.name("turnout.reshape.live", name)
