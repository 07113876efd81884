"""Changing models that exist: every function takes a model and gives ``(model, Report)``, which says what changed."""

from turnout.reshape.adopt import adopt, register_backend, release
from turnout.reshape.drop_experts import drop_experts
from turnout.reshape.merge_experts import merge_experts
from turnout.reshape.split import split
from turnout.reshape.upcycle import upcycle

__all__ = ["adopt", "drop_experts", "merge_experts", "register_backend", "release", "split", "upcycle"]
