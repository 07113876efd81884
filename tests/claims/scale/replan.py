"""No step is taken."""

import sys

from broken import Case


def broken(monkeypatch):
    monkeypatch.setattr(sys.modules["turnout.decide.device.place.replan"], "_step", lambda *_: False)


CASE = Case(broken, pairs={"busiest": "busiest, as it was"})
