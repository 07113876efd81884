"""A machine hears its own byte alone: each is by itself."""

from broken import Case

from turnout.train.zeroth import OneByte


def deaf(monkeypatch):
    apply = OneByte.apply

    def own(self, sent):
        return apply(self, {name: byte for name, byte in sent.items() if name == self.machine} or sent)

    monkeypatch.setattr(OneByte, "apply", own)


CASE = Case(deaf, small={"_STEPS": 20}, pairs={"bytes": "alone"})
