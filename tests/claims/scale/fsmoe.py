"""No size of pieces is tried: reductions stay behind everything."""

import importlib

from broken import Case


def no_pieces(monkeypatch):
    planner = importlib.import_module("turnout.decide.device.fsmoe")
    monkeypatch.setattr(planner, "best", lambda costs, blocks, shapes: planner.tutel(costs, blocks))


CASE = Case(no_pieces, pairs={"fsmoe": "last"}, small={"_PROFILES": 8, "_BLOCKS": 2})
