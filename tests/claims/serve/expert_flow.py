"""What is foreseen and corrected is not used, and requests stay as they arrive."""

import sys

from broken import Case

from turnout.decide.device.cache import LRU


def broken(monkeypatch):
    module = sys.modules["turnout.claims.serve.expert_flow"]
    replay = module.replay
    monkeypatch.setattr(module, "replay", lambda told, policy, sizes: replay(told, LRU(), sizes))
    as_they_arrive = lambda path, size: [tuple(range(n, n + size)) for n in range(0, len(path), size)]  # noqa: E731
    monkeypatch.setattr(module, "regroup", as_they_arrive)


CASE = Case(broken)
