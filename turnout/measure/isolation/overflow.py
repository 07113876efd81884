"""Probe: rows before the victim's that fill the experts it needs, by copies of it and by random search."""

import torch

from turnout.measure.isolation.finding import Finding
from turnout.measure.isolation.seen import Seen
from turnout.measure.isolation.subject import Subject

__all__ = ["overflow"]

_ROWS = 7  # of others before the victim
_STEPS = 40


def overflow(subject: Subject, chance: torch.Generator, batches: int, bound: float) -> Finding:
    """Whether what others say changes the victim's output, in batches of one shape with the victim always last.

    The worst that others can say to a layer whose experts take so many tokens and no more is what fills the experts
    that the victim's tokens need: copies of the victim, copies of one of its tokens, and what a random search finds.

    Source: Hayes et al., 2024, "Buffer Overflow in Mixture of Experts".
    """
    seen, victim = Seen(bound), subject.rows(1, chance)

    def moved(others: torch.Tensor) -> float:
        return seen.add(subject.run(torch.cat((others, victim)))[-1])

    for _ in range(batches):
        moved(subject.rows(_ROWS, chance))
    for place in range(subject.length):
        moved(victim[:, place : place + 1].expand_as(victim).repeat(_ROWS, *[1] * (victim.ndim - 1)))
    best = victim.repeat(_ROWS, *[1] * (victim.ndim - 1))
    most = moved(best)
    for _ in range(_STEPS):
        tried = best.clone()
        row = int(torch.randint(_ROWS, (1,), generator=chance))
        place, of = (int(torch.randint(subject.length, (1,), generator=chance)) for _ in range(2))
        new = subject.rows(1, chance)[0, place] if row % 2 else victim[0, of]
        tried[row, place] = new
        found = moved(tried)
        best, most = (tried, found) if found >= most else (best, most)
    fix = "no limit of capacity: capacity_factor=None here, drop_tokens=False in DeepSpeed; or one tenant a batch"
    return seen.finding("overflow", f"what {_ROWS} rows before it say, made to fill its experts", fix)
