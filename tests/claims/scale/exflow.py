"""Every layer is filled in the order of its experts, whatever stays."""

import sys

import numpy as np
from broken import Case


def broken(monkeypatch):
    search = sys.modules["turnout.decide.device.place.by_affinity"]
    monkeypatch.setattr(search, "_fill", lambda gain_EG, room_G: np.repeat(np.arange(len(room_G)), room_G))


CASE = Case(broken, "lost", pairs={"affinity, 64": "contiguous, 64"})
