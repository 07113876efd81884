"""It gives up what it was told to keep."""

import sys

from broken import Case


def broken(monkeypatch):
    module = sys.modules["turnout.claims.serve.few_predictions"]
    monkeypatch.setattr(
        module, "follow", lambda page_T, **how: module.marking(page_T, capacity=how["capacity"], seed=how["seed"])
    )


PAIRS = {"every 2": "marking", "every 4": "marking", "every 16": "marking", "every 1 wrong": "marking"}
CASE = Case(broken, pairs=PAIRS)
