"""Pure functions from arrays to a ``Solution``: the mathematics under the decisions of every other room."""

from turnout.solve.assignment import assignment
<<<<<<< HEAD
<<<<<<< HEAD
<<<<<<< HEAD
=======
from turnout.solve.list_schedule import list_schedule
>>>>>>> w-e
=======
from turnout.solve.list_schedule import list_schedule
>>>>>>> w-f
from turnout.solve.pipeline import PipelineTimes, pipeline
from turnout.solve.slowed_timeline import slowed_timeline
from turnout.solve.solution import Solution
from turnout.solve.timeline import Timeline, timeline
from turnout.solve.transport import transport

<<<<<<< HEAD
<<<<<<< HEAD
__all__ = ["PipelineTimes", "Solution", "Timeline", "assignment", "pipeline", "timeline", "transport"]
=======
from turnout.solve.chain import chain
from turnout.solve.kept_bound import kept_bound
from turnout.solve.milp import Program, milp
from turnout.solve.solution import Solution
from turnout.solve.surrogate import Surrogate, surrogate
from turnout.solve.transport import transport

__all__ = ["Program", "Solution", "Surrogate", "assignment", "chain", "kept_bound", "milp", "surrogate", "transport"]
>>>>>>> w-g
=======
=======
>>>>>>> w-f
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
<<<<<<< HEAD
>>>>>>> w-e
=======
>>>>>>> w-f
