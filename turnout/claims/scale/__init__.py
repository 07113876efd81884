"""Claims of the family ``scale``: systems that train and place sparse models on many devices."""

from turnout.claims.scale.agvm import agvm
from turnout.claims.scale.block_schedule import block_schedule
from turnout.claims.scale.co2 import co2
from turnout.claims.scale.coded import coded
from turnout.claims.scale.comet import comet
from turnout.claims.scale.diloco import diloco
from turnout.claims.scale.exflow import exflow
from turnout.claims.scale.flowmoe import flowmoe
from turnout.claims.scale.flows import flows
from turnout.claims.scale.fsmoe import fsmoe
from turnout.claims.scale.fuyou import fuyou
from turnout.claims.scale.fzoos import fzoos
from turnout.claims.scale.gpipe import gpipe
from turnout.claims.scale.hecate import hecate
from turnout.claims.scale.interleaved import interleaved
from turnout.claims.scale.moetuner import moetuner
from turnout.claims.scale.one_byte import one_byte
from turnout.claims.scale.post_validation import post_validation
from turnout.claims.scale.replan import replan
from turnout.claims.scale.schedule_search import schedule_search
from turnout.claims.scale.shuffle_private import shuffle_private
from turnout.claims.scale.sparse_zo import sparse_zo
from turnout.claims.scale.superpipeline import superpipeline
from turnout.claims.scale.surco import surco
from turnout.claims.scale.tutel import tutel
from turnout.claims.scale.zero import zero
from turnout.claims.scale.zero_bubble import zero_bubble
from turnout.claims.scale.zero_plus_plus import zero_plus_plus
from turnout.claims.scale.zeropp import zeropp

__all__ = [
    "agvm",
    "block_schedule",
    "co2",
    "coded",
    "comet",
    "diloco",
    "exflow",
    "flowmoe",
    "flows",
    "fsmoe",
    "fuyou",
    "fzoos",
    "gpipe",
    "hecate",
    "interleaved",
    "moetuner",
    "one_byte",
    "post_validation",
    "replan",
    "schedule_search",
    "shuffle_private",
    "sparse_zo",
    "superpipeline",
    "surco",
    "tutel",
    "zero",
    "zero_bubble",
    "zero_plus_plus",
    "zeropp",
]
