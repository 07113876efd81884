"""No copy is made."""

import sys

from broken import Case


def broken(monkeypatch):
    monkeypatch.setattr(sys.modules["turnout.decide.device.place.hecate"], "_copied", lambda *_: False)


CASE = Case(broken, pairs={"sparse": "home"})
