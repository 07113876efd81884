"""B stays in one piece: every arm is 1F1B."""

import importlib

from broken import Case

from turnout.decide import device
from turnout.solve import pipeline
from turnout.types import StageCosts


def whole(monkeypatch):
    module = importlib.import_module("turnout.claims.scale.zero_bubble")

    def flat(schedule, costs):
        p, m = schedule.ranks, schedule.microbatches
        if costs.stages > p:  # of the V
            pairs = zip(costs.forward_S[::2], costs.input_S[::2], costs.weight_S[::2], strict=True)
            costs = StageCosts(*(tuple(2 * one for one in each) for each in zip(*pairs, strict=True)), send=costs.send)
        return pipeline(device.one_f_one_b(p, m), costs)

    monkeypatch.setattr(module, "pipeline", flat)


CASE = Case(whole)
