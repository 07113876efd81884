"""Nothing is tried beyond the published schedules."""

import importlib

from broken import Case


def published_only(monkeypatch):
    module = importlib.import_module("turnout.decide.device.search")
    monkeypatch.setattr(module._Search, "improve", lambda self, holders: None)


CASE = Case(published_only, small={"_CASES": 2})
