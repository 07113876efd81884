"""Pure functions from arrays to a ``Solution``: the mathematics under the decisions of every other room."""

from turnout.solve.assignment import assignment
from turnout.solve.chain import chain
from turnout.solve.kept_bound import kept_bound
from turnout.solve.list_schedule import list_schedule
from turnout.solve.milp import Program, milp
from turnout.solve.paging import Turn, paging
from turnout.solve.pipeline import PipelineTimes, pipeline
from turnout.solve.replacement import Faults, belady, belady_states, follow, lru, marking, prefix_optima
from turnout.solve.scaling import ScalingLaw, fit_scaling
from turnout.solve.slowed_timeline import slowed_timeline
from turnout.solve.solution import Solution
from turnout.solve.surrogate import Surrogate, surrogate
from turnout.solve.timeline import Timeline, timeline
from turnout.solve.transport import transport

__all__ = [
    "Faults",
    "PipelineTimes",
    "Program",
    "ScalingLaw",
    "Solution",
    "Surrogate",
    "Timeline",
    "Turn",
    "assignment",
    "belady",
    "belady_states",
    "chain",
    "fit_scaling",
    "follow",
    "kept_bound",
    "list_schedule",
    "lru",
    "marking",
    "milp",
    "paging",
    "pipeline",
    "prefix_optima",
    "slowed_timeline",
    "surrogate",
    "timeline",
    "transport",
]
