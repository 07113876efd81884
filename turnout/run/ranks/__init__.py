"""Many processes that train one model: how they meet, agree, share it and talk, on torch's own engine."""

from turnout.run.ranks.processes import Ranks, agree, end, launched, start
from turnout.run.ranks.shard import mesh, shard
from turnout.run.ranks.subnet import agreed
from turnout.run.ranks.watch import answering
from turnout.run.ranks.zero_plus_plus import Int4Reduce, Int8Gather, travel

__all__ = [
    "Int4Reduce",
    "Int8Gather",
    "Ranks",
    "agree",
    "agreed",
    "answering",
    "end",
    "launched",
    "mesh",
    "shard",
    "start",
    "travel",
]
