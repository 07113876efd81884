"""The thesis, word for word: policies that decide what runs. Each level of decision is a package of its own."""

__all__ = ["device", "token"]

from turnout.decide import device, token
