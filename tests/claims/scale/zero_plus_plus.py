"""Every tensor gets one scale, whatever block is asked for."""

import importlib

from broken import Case

claim = importlib.import_module("turnout.claims.scale.zero_plus_plus")


def one_scale(monkeypatch):
    monkeypatch.setattr(claim, "_WEIGHT_BLOCK", claim._WHOLE)
    monkeypatch.setattr(claim, "_GRADIENT_BLOCK", claim._WHOLE)


CASE = Case(
    one_scale,
    pairs={"weights": "weights, one scale", "gradients": "gradients, one scale"},
    small={"_STEPS": 6},
)
