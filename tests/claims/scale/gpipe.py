"""The batch is not cut: one microbatch that takes as long as all."""

import importlib

from broken import Case

from turnout.decide import device
from turnout.solve import pipeline
from turnout.types import StageCosts


def whole(monkeypatch):
    def in_one(schedule, costs):
        m = schedule.microbatches
        each = (costs.forward_S, costs.input_S, costs.weight_S)
        return pipeline(device.gpipe(schedule.ranks, 1), StageCosts(*(tuple(m * one for one in s) for s in each)))

    monkeypatch.setattr(importlib.import_module("turnout.claims.scale.gpipe"), "pipeline", in_one)


CASE = Case(whole)
