"""All steps on the host wait for the end of the backward pass, whatever the plan says."""

import importlib

from broken import Case


def waits(monkeypatch):
    claim = importlib.import_module("turnout.claims.scale.fuyou")
    times = claim._times
    monkeypatch.setattr(claim, "_times", lambda *how: (times(*how)[1], *times(*how)[1:]))


CASE = Case(waits, pairs={"planned": "steps after"})
