"""Attention stays outside the pipeline, and reductions behind everything."""

import importlib

from broken import Case


def only_the_experts(monkeypatch):
    planner = importlib.import_module("turnout.decide.device.block_schedule")
    monkeypatch.setitem(planner.PUBLISHED, "flowmoe", planner.PUBLISHED["tutel"])


CASE = Case(
    only_the_experts,
    pairs={"flowmoe": "tutel", "ratio": "ratio off"},
    small={"_PROFILES": 2, "_BLOCKS": 2, "_DRAWS": 12},
)
