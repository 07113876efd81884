"""Ours has a limit as well, and its tiles do not ask."""

import contextlib
import sys

from broken import Case


def broken(monkeypatch):
    module = sys.modules["turnout.claims.serve.buffer_overflow"]
    monkeypatch.setattr(module, "_OURS", module._SLACK)
    monkeypatch.setattr(module, "batch_invariant", contextlib.nullcontext)


CASE = Case(broken, seen="near")
