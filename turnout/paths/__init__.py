"""Paths: modules that can be chosen, and the dense ones that always run."""

from turnout.paths.bank import Bank, FeedForward

__all__ = ["Bank", "FeedForward"]
