"""Replacement: what a full cache gives up, as replays of a whole sequence of requests, optimal and online."""

from turnout.solve.replacement.belady import belady, belady_states, prefix_optima
from turnout.solve.replacement.faults import Faults
from turnout.solve.replacement.follow import follow
from turnout.solve.replacement.lru import lru
from turnout.solve.replacement.marking import marking

__all__ = ["Faults", "belady", "belady_states", "follow", "lru", "marking", "prefix_optima"]
