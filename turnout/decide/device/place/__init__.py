"""Placements: which device holds which expert, from the traffic that a trace recorded. Pure functions on arrays."""

from turnout.decide.device.place.both import both
from turnout.decide.device.place.by_affinity import by_affinity
from turnout.decide.device.place.by_load import by_load
from turnout.decide.device.place.eplb import Eplb, eplb
from turnout.decide.device.place.exflow import Solved, exflow
from turnout.decide.device.place.hecate import Materialised, hecate
from turnout.decide.device.place.moetuner import moetuner
from turnout.decide.device.place.replan import replan
from turnout.decide.device.place.shift import shift
from turnout.decide.device.place.surco import latency, surco

__all__ = [
    "Eplb",
    "Materialised",
    "Solved",
    "both",
    "by_affinity",
    "by_load",
    "eplb",
    "exflow",
    "hecate",
    "latency",
    "moetuner",
    "replan",
    "shift",
    "surco",
]
