"""Changing models that exist: every function takes a model and gives ``(model, Report)``, which says what changed."""

from turnout.reshape.adopt import adopt, register_backend, release
from turnout.reshape.upcycle import upcycle

__all__ = ["adopt", "register_backend", "release", "upcycle"]
