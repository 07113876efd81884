"""Coded training: answers that are missing can be done without."""

from turnout.train.coding.code import GradientCode, gradient_code
from turnout.train.coding.race import Race, gilbert_elliot, race
from turnout.train.coding.sequential import Coded, Multiplexed, Scheme, SelectiveRepeat

__all__ = [
    "Coded",
    "GradientCode",
    "Multiplexed",
    "Race",
    "Scheme",
    "SelectiveRepeat",
    "gilbert_elliot",
    "gradient_code",
    "race",
]
