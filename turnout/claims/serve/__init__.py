"""Claims of the family ``serve``: sparse models served in little memory, to many, and better at the same cost."""

from turnout.claims.serve.buffer_overflow import buffer_overflow
from turnout.claims.serve.few_predictions import few_predictions

__all__ = ["buffer_overflow", "few_predictions"]
