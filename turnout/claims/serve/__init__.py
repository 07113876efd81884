"""Claims of the family ``serve``: sparse models served in little memory, to many, and better at the same cost."""

from turnout.claims.serve.buffer_overflow import buffer_overflow
from turnout.claims.serve.c3po import c3po
from turnout.claims.serve.expert_caching import expert_caching
from turnout.claims.serve.expert_flow import expert_flow
from turnout.claims.serve.few_predictions import few_predictions
from turnout.claims.serve.pr_moe import pr_moe
from turnout.claims.serve.pre_gated import pre_gated
from turnout.claims.serve.scmoe import scmoe
from turnout.claims.serve.trace_matching import trace_matching

__all__ = [
    "buffer_overflow",
    "c3po",
    "expert_caching",
    "expert_flow",
    "few_predictions",
    "pr_moe",
    "pre_gated",
    "scmoe",
    "trace_matching",
]
