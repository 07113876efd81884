"""Probe: the same rows in another order."""

import torch

from turnout.measure.isolation.finding import Finding
from turnout.measure.isolation.seen import Seen
from turnout.measure.isolation.subject import Subject

__all__ = ["position"]


def position(subject: Subject, chance: torch.Generator, batches: int, bound: float) -> Finding:
    """Whether it matters where in the batch the victim stands, beside the same other rows.

    Source: none; arrival order as in Hayes et al., 2024, "Buffer Overflow in Mixture of Experts".
    """
    seen, victim, others = Seen(bound), subject.rows(1, chance), subject.rows(11, chance)
    others[:5] = victim  # who wants what it wants: whoever comes first may get it
    for at in range(len(others) + 1):
        seen.add(subject.run(torch.cat((others[:at], victim, others[at:])))[at])
    fix = "no limit of capacity: capacity_factor=None here, drop_tokens=False in DeepSpeed"
    return seen.finding("position", "its place among 12 rows", fix)
