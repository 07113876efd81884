"""Federated training, simulated in one process: what no server holds, clients train."""

from typing import TYPE_CHECKING

from turnout import moved
from turnout.train.federated.fedjets import fedjets
from turnout.train.federated.rounds import Client, Round, aggregate, federate

__all__ = [
    "Client",
    "Round",
    "aggregate",
    "federate",
    "fedjets",
]

if not TYPE_CHECKING:  # a checker would take every name for there

    def __getattr__(name: str) -> object:
        return moved.name("turnout.train.federated", name)
