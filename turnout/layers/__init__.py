"""Layers: paths, a policy and a backend as one module."""

from turnout.layers.moe import MoE
from turnout.layers.turnout import Routed, Turnout

__all__ = ["MoE", "Routed", "Turnout"]
