"""Tiles are not put in the order in which their rows come, nor results by columns."""

import importlib

from broken import Case


def unsorted(monkeypatch):
    claim = importlib.import_module("turnout.claims.scale.comet")
    layer = claim._layer
    monkeypatch.setattr(claim, "_layer", lambda wire, product, own, _, chance: layer(wire, product, own, False, chance))


CASE = Case(unsorted, "near", pairs={"comet": "unsorted"})
