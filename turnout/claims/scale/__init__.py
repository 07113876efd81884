"""Claims of the family ``scale``: systems that train and place sparse models on many devices."""

from turnout.claims.scale.zero import zero

__all__ = [
    "zero",
]
