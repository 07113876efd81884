"""The entries found are not the sensitive ones: as many, drawn at random."""

import torch
from broken import Case

from turnout.claims.scale import sparse_zo as _  # noqa: F401


def drawn(monkeypatch):
    import sys

    claim = sys.modules["turnout.claims.scale.sparse_zo"]
    sensitive = claim.sensitive

    def at_random(model, losses, *, share):
        count = sum(len(one) for one in sensitive(model, losses, share=share).values())
        return claim._at_random(model, count, torch.Generator().manual_seed(99))

    monkeypatch.setattr(claim, "sensitive", at_random)


CASE = Case(drawn, "lost", pairs={"left out": "left out, random", "sensitive": "random"}, small={"_STEPS": 150})
