"""Executors: tensors and a routing in, tensors out. They do not know who made the decision.

All of them give the same values and gradients as ``reference``; they differ in speed and in what they can take.
"""

from turnout.run.by_slots import experts_by_slots
from turnout.run.calibrate import calibrate
from turnout.run.choose import EXECUTORS, Choice, choose, execute
from turnout.run.factored import factored, factored_reference, written_out
from turnout.run.grouped import grouped
from turnout.run.kernels import kernels
from turnout.run.low_rank import low_rank, low_rank_merged, low_rank_reference
from turnout.run.merged import merged
from turnout.run.packed import packed_experts, packed_linear, packed_reference
from turnout.run.reference import activate, reference
from turnout.run.sort import sort

__all__ = [
    "EXECUTORS",
    "Choice",
    "activate",
    "calibrate",
    "choose",
    "execute",
    "experts_by_slots",
    "factored",
    "factored_reference",
    "grouped",
    "kernels",
    "low_rank",
    "low_rank_merged",
    "low_rank_reference",
    "merged",
    "packed_experts",
    "packed_linear",
    "packed_reference",
    "reference",
    "sort",
    "written_out",
]
