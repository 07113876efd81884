"""Paths: modules that can be chosen, and the dense ones that always run."""

from turnout.paths.bank import Bank, FeedForward
from turnout.paths.constant import ZeroComputation
from turnout.paths.factored import FactoredBank
from turnout.paths.lora import LoRA
from turnout.paths.low_rank import LowRank
from turnout.paths.mixed import Mixed, every
from turnout.paths.offloaded import OffloadedBank
from turnout.paths.packed import PackedBank, PackedFeedForward, PackedLinear, PackedWeight
from turnout.paths.scalearn import ScaLearn
from turnout.paths.shards import Shards
from turnout.paths.ssf import SSF

__all__ = [
    "SSF",
    "Bank",
    "FactoredBank",
    "FeedForward",
    "LoRA",
    "LowRank",
    "Mixed",
    "OffloadedBank",
    "PackedBank",
    "PackedFeedForward",
    "PackedLinear",
    "PackedWeight",
    "ScaLearn",
    "Shards",
    "ZeroComputation",
    "every",
]
