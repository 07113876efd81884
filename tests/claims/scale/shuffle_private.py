"""Nothing is shuffled: each user has to toss as many coins as all of them together."""

import dataclasses

from broken import Case

from turnout.claims.scale import shuffle_private as _  # noqa: F401


def unshuffled(monkeypatch):
    import sys

    claim = sys.modules["turnout.claims.scale.shuffle_private"]
    shuffled_sum = claim.shuffled_sum

    def alone(users, dimensions, **how):
        return dataclasses.replace(shuffled_sum(1, dimensions, **how), users=users)

    monkeypatch.setattr(claim, "shuffled_sum", alone)


CASE = Case(unshuffled, "lost", small={"_USERS": 2000, "_BATCH": 200})
