"""Training that seldom talks: replicas take local steps, and meet in an outer one."""

from turnout.train.local.average import alone, over, payload_bytes, rounded
from turnout.train.local.co2 import CO2, Overlap, overlap
from turnout.train.local.diloco import DiLoCo, nesterov

__all__ = [
    "CO2",
    "DiLoCo",
    "Overlap",
    "alone",
    "nesterov",
    "over",
    "overlap",
    "payload_bytes",
    "rounded",
]
