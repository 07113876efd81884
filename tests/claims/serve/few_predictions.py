"""It hears nothing of what it is told."""

import sys

from broken import Case


def broken(monkeypatch):
    module = sys.modules["turnout.claims.serve.few_predictions"]
    monkeypatch.setattr(
        module,
        "follow",
        lambda page_T, *, capacity, seed, **how: module.marking(page_T, capacity=capacity, seed=seed),
    )


CASE = Case(broken)
