"""What all clients' surrogates are together is not told: each takes its own, and there is nothing to correct."""

import torch
from broken import Case

from turnout.train.zeroth import Features


def untold(monkeypatch):
    monkeypatch.setattr(Features, "gradient", lambda self, weight_M, x_D: torch.zeros_like(x_D))


CASE = Case(untold, small={"_ROUNDS": 3, "_FEDZO_ROUNDS": 4, "_FEDZO_RATES": (1.0,)})
