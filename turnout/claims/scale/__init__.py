"""Claims of the family ``scale``: systems that train and place sparse models on many devices."""

from turnout.claims.scale.block_schedule import block_schedule
from turnout.claims.scale.co2 import co2
from turnout.claims.scale.coded import coded
from turnout.claims.scale.comet import comet
from turnout.claims.scale.diloco import diloco
from turnout.claims.scale.flowmoe import flowmoe
from turnout.claims.scale.fsmoe import fsmoe
from turnout.claims.scale.one_byte import one_byte
from turnout.claims.scale.tutel import tutel
from turnout.claims.scale.zero import zero
from turnout.claims.scale.zero_plus_plus import zero_plus_plus

__all__ = [
    "block_schedule",
    "co2",
    "coded",
    "comet",
    "diloco",
    "flowmoe",
    "fsmoe",
    "one_byte",
    "tutel",
    "zero",
    "zero_plus_plus",
]
