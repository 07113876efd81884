"""No device is told how many share a copy: everybody holds all of it."""

import dataclasses
import importlib

from broken import Case

from turnout.types import Layout


def alone(monkeypatch):
    claim = importlib.import_module("turnout.claims.scale.zero")
    monkeypatch.setattr(claim, "Layout", lambda dp_shard, zero: dataclasses.replace(Layout(dp_shard=dp_shard), zero=0))


CASE = Case(alone)
