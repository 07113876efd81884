"""Claims of the family ``scale``: systems that train and place sparse models on many devices."""

from turnout.claims.scale.agvm import agvm
from turnout.claims.scale.co2 import co2
from turnout.claims.scale.coded import coded
from turnout.claims.scale.diloco import diloco
from turnout.claims.scale.one_byte import one_byte
from turnout.claims.scale.shuffle_private import shuffle_private
from turnout.claims.scale.sparse_zo import sparse_zo
from turnout.claims.scale.zero import zero
from turnout.claims.scale.zero_plus_plus import zero_plus_plus

__all__ = [
    "agvm",
    "co2",
    "coded",
    "diloco",
    "one_byte",
    "shuffle_private",
    "sparse_zo",
    "zero",
    "zero_plus_plus",
]
