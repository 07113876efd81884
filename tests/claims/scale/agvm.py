"""Factors are measured and not used: every module steps at one rate."""

from broken import Case

from turnout.train import AGVM


def even(monkeypatch):
    look = AGVM.look

    def without(self, first, second):
        look(self, first, second)
        self.factors = [1.0] * len(self.factors)
        return self.factors

    monkeypatch.setattr(AGVM, "look", without)


CASE = Case(even, pairs={"AGVM": "one rate", "AGVM, Adam": "one rate, Adam"})
