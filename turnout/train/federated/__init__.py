"""Federated training, simulated in one process: what no server holds, clients train."""

from turnout.train.federated.fedjets import fedjets
from turnout.train.federated.rounds import Client, Round, aggregate, federate

__all__ = [
    "Client",
    "Round",
    "aggregate",
    "federate",
    "fedjets",
]
