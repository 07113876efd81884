"""Probe: equal rows in one batch. Where they get unequal outputs, a tie was broken, and a guess can be confirmed."""

import dataclasses

import torch

from turnout.measure.isolation.finding import Finding
from turnout.measure.isolation.seen import Seen
from turnout.measure.isolation.subject import Subject

__all__ = ["ties"]

_MOST = 9


def ties(subject: Subject, chance: torch.Generator, batches: int, bound: float) -> Finding:
    """Whether rows that are equal give outputs that are equal, however many of them there are.

    Experts that choose among the tokens of a batch, or that keep the highest scores, must break ties: who guesses
    another's prompt and sees its own copy treated otherwise has confirmed the guess.

    Source: Yona et al., 2024, "Stealing User Prompts from Mixture of Experts".
    """
    worst, compared = None, 0
    for trial in range(max(2, batches // 4)):
        copies = 2 + trial % (_MOST - 1)
        row = subject.rows(1, chance)
        others = subject.rows(1 + trial % 5, chance)
        many = row.repeat(copies, *[1] * (row.ndim - 1))
        half = copies // 2
        y = subject.run(torch.cat((many[:half], others, many[half:])))
        seen = Seen(bound)
        for place in (*range(half), *range(half + len(others), copies + len(others))):
            seen.add(y[place])
        fix = "tokens choose experts (TopK), without a limit of capacity: no ties among a batch's rows"
        compared += copies
        found = seen.finding("ties", f"equal rows of one batch, 2 to {_MOST} of them", fix)
        worst = found if worst is None or _rank(found) > _rank(worst) else worst
    assert worst is not None
    return dataclasses.replace(worst, batches=compared)


def _rank(found: Finding) -> tuple[float, int]:
    return found.difference, found.outputs
