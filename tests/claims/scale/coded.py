"""No scheme bears any loss: every round waits for everyone, as uncoded ones do, with the work of the coded ones."""

from broken import Case

from turnout.train.coding import Coded, Multiplexed, SelectiveRepeat


def waits(monkeypatch):
    for scheme in (Coded, Multiplexed, SelectiveRepeat):
        monkeypatch.setattr(scheme, "bears", lambda self, late_W: False)


CASE = Case(
    waits,
    "lost",
    pairs={"M-SGC": "uncoded", "SR-SGC": "uncoded", "GC": "uncoded"},
    small={"_JOBS": 60},
)
