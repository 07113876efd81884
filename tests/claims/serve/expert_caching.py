"""Every technique is fetching on demand."""

import sys

from broken import Case


def broken(monkeypatch):
    module = sys.modules["turnout.claims.serve.expert_caching"]
    replay = module.replay
    least = module.CacheShape
    monkeypatch.setattr(
        module,
        "replay",
        lambda told, policy, sizes, ahead=0: replay(told, module.LRU(), least(told.layers, told.experts, told.most)),
    )


CASE = Case(broken)
