"""Live transformers models, changed in place: their experts run through turnout's executors, and back."""

from turnout.reshape.live.adopt import adopt, register_backend, release

__all__ = [
    "adopt",
    "register_backend",
    "release",
]
