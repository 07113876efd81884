"""Claims of the family ``scale``: systems that train and place sparse models on many devices."""

from turnout.claims.scale.exflow import exflow
from turnout.claims.scale.flows import flows
from turnout.claims.scale.hecate import hecate
from turnout.claims.scale.moetuner import moetuner
from turnout.claims.scale.replan import replan
from turnout.claims.scale.surco import surco

__all__ = [
    "exflow",
    "flows",
    "hecate",
    "moetuner",
    "replan",
    "surco",
]
