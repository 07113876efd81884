"""What was planned is done in any order."""

import importlib

from broken import Case


def in_any_order(monkeypatch):
    claim = importlib.import_module("turnout.claims.scale.block_schedule")
    plan = claim._ours

    def shuffled(profiles):
        return [claim._in_any_order(one, costs, 0) for one, costs in zip(plan(profiles), profiles, strict=True)]

    monkeypatch.setattr(claim, "_ours", shuffled)


CASE = Case(in_any_order, small={"_PROFILES": 4})
