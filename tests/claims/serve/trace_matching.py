"""It compares what has not run."""

import numpy as np
from broken import Case

from turnout.decide.device.cache import TraceMatching


def unseen(self, state):
    unseen_L = ~state.count_LE.any(1)
    return int(state.like_NL[:, unseen_L].sum(1).argmax()) if unseen_L.any() else int(np.int64(0))


def broken(monkeypatch):
    monkeypatch.setattr(TraceMatching, "match", unseen)


CASE = Case(broken, pairs={"seen": "unseen"})
