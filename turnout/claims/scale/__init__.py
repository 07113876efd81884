"""Claims of the family ``scale``: systems that train and place sparse models on many devices."""

from turnout.claims.scale.co2 import co2
from turnout.claims.scale.coded import coded
from turnout.claims.scale.diloco import diloco
from turnout.claims.scale.fuyou import fuyou
from turnout.claims.scale.one_byte import one_byte
from turnout.claims.scale.superpipeline import superpipeline
from turnout.claims.scale.zero import zero
from turnout.claims.scale.zero_plus_plus import zero_plus_plus

__all__ = [
    "co2",
    "coded",
    "diloco",
    "fuyou",
    "one_byte",
    "superpipeline",
    "zero",
    "zero_plus_plus",
]
