"""Training what adapters are made of and who chooses them, on a model that exists; nothing else of it changes."""

from turnout.train.adapters.router import train_routers
from turnout.train.adapters.shards import train_shards

__all__ = [
    "train_routers",
    "train_shards",
]
