"""Pure functions from arrays to a ``Solution``: the mathematics under the decisions of every other room."""

from turnout.solve.assignment import assignment
from turnout.solve.list_schedule import list_schedule
from turnout.solve.pipeline import PipelineTimes, pipeline
from turnout.solve.slowed_timeline import slowed_timeline
from turnout.solve.solution import Solution
from turnout.solve.timeline import Timeline, timeline
from turnout.solve.transport import transport

__all__ = [
    "PipelineTimes",
    "Solution",
    "Timeline",
    "assignment",
    "list_schedule",
    "pipeline",
    "slowed_timeline",
    "timeline",
    "transport",
]
