"""Claims of the family ``serve``: sparse models served in little memory, to many, and better at the same cost."""

from turnout.claims.serve.few_predictions import few_predictions

__all__ = ["few_predictions"]
