"""Layers: paths, a policy and a backend as one module."""

from turnout.layers.adapter import Adapter, SequenceRouter
from turnout.layers.moe import MoE
from turnout.layers.scaled import Asking, Scaled
from turnout.layers.sharded import Sharded
from turnout.layers.told import given
from turnout.layers.turnout import Routed, Turnout

__all__ = ["Adapter", "Asking", "MoE", "Routed", "Scaled", "SequenceRouter", "Sharded", "Turnout", "given"]
