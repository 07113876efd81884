"""What takes turns in memory: blocks of a model that is trained, and the experts of one that is run."""

from turnout.run.swap.experts import ExpertCache, ExpertSource, Part
from turnout.run.swap.offload import Offloaded

__all__ = ["ExpertCache", "ExpertSource", "Offloaded", "Part"]
