"""Only degree 1 is tried."""

import importlib

from broken import Case


def one_degree(monkeypatch):
    monkeypatch.setattr(importlib.import_module("turnout.claims.scale.tutel"), "_degrees", lambda: range(1, 2))


CASE = Case(one_degree, pairs={"piped": "one chunk", "gain": "no gain"})
