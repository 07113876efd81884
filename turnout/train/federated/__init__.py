"""Federated training, simulated in one process: what no server holds, clients train."""

from typing import TYPE_CHECKING

from turnout import moved
from turnout.train.federated.fedjets import fedjets
from turnout.train.federated.rounds import Client, Round, aggregate, federate
from turnout.train.federated.shuffle_private import ShuffledSum, private_sgd, shuffled_sum

__all__ = [
    "Client",
    "Round",
    "ShuffledSum",
    "aggregate",
    "federate",
    "fedjets",
    "private_sgd",
    "shuffled_sum",
]

if not TYPE_CHECKING:  # a checker would take every name for there

    def __getattr__(name: str) -> object:
        return moved.name("turnout.train.federated", name)
