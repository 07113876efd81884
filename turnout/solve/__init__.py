"""Pure functions from arrays to a ``Solution``: the mathematics under the decisions of every other room."""

from turnout.solve.assignment import assignment
from turnout.solve.pipeline import PipelineTimes, pipeline
from turnout.solve.solution import Solution
from turnout.solve.timeline import Timeline, timeline
from turnout.solve.transport import transport

__all__ = ["PipelineTimes", "Solution", "Timeline", "assignment", "pipeline", "timeline", "transport"]
