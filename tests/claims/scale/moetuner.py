"""Clusters are the experts in their order."""

import sys

import numpy as np
from broken import Case


def broken(monkeypatch):
    programs = sys.modules["turnout.decide.device.place.moetuner"]
    monkeypatch.setattr(
        programs, "_clusters", lambda load_E, devices, seconds: np.repeat(np.arange(devices), len(load_E) // devices)
    )


CASE = Case(broken, pairs={"busiest": "busiest, contiguous"})
