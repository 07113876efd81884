"""Nothing is fetched ahead, whatever the plan says."""

import importlib

from broken import Case


def none_ahead(monkeypatch):
    monkeypatch.setattr(importlib.import_module("turnout.claims.scale.superpipeline"), "_AHEAD", 0)


CASE = Case(none_ahead)
