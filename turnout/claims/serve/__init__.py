"""Claims of the family ``serve``: sparse models served in little memory, to many, and better at the same cost."""

from turnout.claims.serve.buffer_overflow import buffer_overflow
from turnout.claims.serve.c3po import c3po
from turnout.claims.serve.few_predictions import few_predictions
from turnout.claims.serve.pr_moe import pr_moe
from turnout.claims.serve.scmoe import scmoe

__all__ = ["buffer_overflow", "c3po", "few_predictions", "pr_moe", "scmoe"]
