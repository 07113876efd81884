"""What was planned is done in any order."""

import importlib
import random

from broken import Case

from turnout.claims.scale.block_profiles import reordered


def in_any_order(monkeypatch):
    claim = importlib.import_module("turnout.claims.scale.block_schedule")
    plan, chance = claim._ours, random.Random(1)

    def shuffled(profiles):
        plans = zip(plan(profiles), profiles, strict=True)
        return [reordered(one, costs, lambda _: chance.random()) for one, costs in plans]

    monkeypatch.setattr(claim, "_ours", shuffled)


CASE = Case(in_any_order, "lost", pairs={"ours": "random"}, small={"_PROFILES": 4})
