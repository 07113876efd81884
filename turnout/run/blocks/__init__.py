"""A transformer block's tasks played in a planned order, on the chip and on the wire."""

from turnout.run.blocks.wire import Slow, Wire

__all__ = ["Slow", "Wire"]
