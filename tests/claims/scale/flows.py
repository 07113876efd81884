"""Flows are hashed."""

import sys

from broken import Case

from turnout.decide.device import ecmp


def broken(monkeypatch):
    monkeypatch.setattr(sys.modules["turnout.claims.scale.flows"], "split", ecmp)


CASE = Case(broken, pairs={"mean": "mean, hashed"})
