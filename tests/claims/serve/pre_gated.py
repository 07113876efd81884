"""It is told nothing."""

import sys

from broken import Case

from turnout.decide.device.cache import PreGated


def broken(monkeypatch):
    module = sys.modules["turnout.claims.serve.pre_gated"]
    replay = module.replay

    def told_nothing(told, policy, sizes, ahead=0):
        early = isinstance(policy, PreGated) and policy.prefetch
        return replay(told, module.LRU() if early else policy, sizes, ahead=0 if early else ahead)

    monkeypatch.setattr(module, "replay", told_nothing)


CASE = Case(broken)
