"""Probe: the same batch, again and again. What differs then is chance or a race, and nothing else can be told apart."""

import torch

from turnout.measure.isolation.finding import Finding
from turnout.measure.isolation.seen import Seen
from turnout.measure.isolation.subject import Subject

__all__ = ["repeat"]


def repeat(subject: Subject, chance: torch.Generator, batches: int, bound: float) -> Finding:
    """Whether the same batch gives the same output every time.

    Source: none; the control of all other probes.
    """
    seen, row_BS = Seen(bound), subject.rows(8, chance)
    for _ in range(4):
        seen.add(subject.run(row_BS)[-1])
    fix = "model.eval(); no noise, shuffling or sampled gates at inference"
    return seen.finding("repeat", "the same batch again", fix, bits=fix)
