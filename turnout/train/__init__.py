"""Training: losses on routings, streams of tokens, and the loop that turns them into a trained model."""

from typing import TYPE_CHECKING

from turnout import moved
from turnout.train.adapters import train_routers, train_shards
from turnout.train.agvm import AGVM
from turnout.train.balance import load_balance_loss, router_z_loss
from turnout.train.config import TrainConfig, TrainResult
from turnout.train.federated import (
    Client,
    Round,
    ShuffledSum,
    aggregate,
    federate,
    fedjets,
    private_sgd,
    shuffled_sum,
)
from turnout.train.loop import train
from turnout.train.schedule import cosine, wsd

__all__ = [
    "AGVM",
    "Client",
    "Round",
    "ShuffledSum",
    "TrainConfig",
    "TrainResult",
    "aggregate",
    "cosine",
    "federate",
    "fedjets",
    "load_balance_loss",
    "private_sgd",
    "router_z_loss",
    "shuffled_sum",
    "train",
    "train_routers",
    "train_shards",
    "wsd",
]

if not TYPE_CHECKING:  # a checker would take every name for there

    def __getattr__(name: str) -> object:
        return moved.name("turnout.train", name)
