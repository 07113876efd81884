"""Training: losses on routings, streams of tokens, and the loop that turns them into a trained model."""

from turnout.train.adapters import train_routers, train_shards
from turnout.train.balance import load_balance_loss, router_z_loss
from turnout.train.config import TrainConfig, TrainResult
from turnout.train.federated import Client, Round, aggregate, federate, fedjets
from turnout.train.loop import train
from turnout.train.schedule import cosine, wsd

__all__ = [
    "Client",
    "Round",
    "TrainConfig",
    "TrainResult",
    "aggregate",
    "cosine",
    "federate",
    "fedjets",
    "load_balance_loss",
    "router_z_loss",
    "train",
    "train_routers",
    "train_shards",
    "wsd",
]
