"""Dense to sparse: the feed-forward layers of a model become experts, copied, divided or masked."""

from turnout.reshape.to_sparse.diversify import diversify
from turnout.reshape.to_sparse.read_me import read_me
from turnout.reshape.to_sparse.split import split
from turnout.reshape.to_sparse.upcycle import upcycle

__all__ = [
    "diversify",
    "read_me",
    "split",
    "upcycle",
]
