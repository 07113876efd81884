"""The nouns that every room shares, and the one glossary of shape letters.

Shape letters, used as suffixes of tensor names (``weight_TK`` has T rows and K columns):

    T tokens      E experts     K experts chosen per token   R routed entries of a Routing (T·K when dropless)
    D width       F expert (or feed-forward) hidden width    V vocabulary
    B batch       S sequence positions (in models)           H attention heads      C capacity of an expert
    L layers      P paths       G devices or expert groups   Q queries              N documents
"""

from turnout.types.accesses import Accesses
from turnout.types.block_costs import BlockCosts, Line
from turnout.types.block_schedule import BlockSchedule, BlockTask
from turnout.types.cluster import Cluster
from turnout.types.cost import Budget, Cost
from turnout.types.expert_cache import Access, CachePolicy, CacheShape, Decision
from turnout.types.expert_stats import ExpertStats
from turnout.types.factored import FactoredWeights
from turnout.types.given import Given
from turnout.types.invariant import batch_invariant
from turnout.types.layout import Layout
from turnout.types.low_rank import LowRankWeights
from turnout.types.offload_plan import OffloadPlan
from turnout.types.packed import Packed
from turnout.types.packed_weights import PackedWeights
from turnout.types.padding import spread
from turnout.types.placement import Moves, Placement
from turnout.types.plan import Plan
from turnout.types.report import Report
from turnout.types.routing import Routing
from turnout.types.schedule import Action, Schedule
from turnout.types.stage_costs import StageCosts
from turnout.types.trace import Trace
from turnout.types.trace_writer import TraceWriter
from turnout.types.traffic import Traffic
from turnout.types.tuning import Tuning
from turnout.types.weights import ExpertWeights
from turnout.types.workload import BlockSize, Workload

__all__ = [
    "Access",
    "Accesses",
    "Action",
    "BlockCosts",
    "BlockSchedule",
    "BlockSize",
    "BlockTask",
    "Budget",
    "CachePolicy",
    "CacheShape",
    "Cluster",
    "Cost",
    "Decision",
    "ExpertStats",
    "ExpertWeights",
    "FactoredWeights",
    "Given",
    "Layout",
    "Line",
    "LowRankWeights",
    "Moves",
    "OffloadPlan",
    "Packed",
    "PackedWeights",
    "Placement",
    "Plan",
    "Report",
    "Routing",
    "Schedule",
    "StageCosts",
    "Trace",
    "TraceWriter",
    "Traffic",
    "Tuning",
    "Workload",
    "batch_invariant",
    "spread",
]
