"""Blocks of a model that take turns on the device, from the host's memory or a disk."""

from turnout.run.swap.offload import Offloaded

__all__ = ["Offloaded"]
