"""Probe: more and fewer rows beside the victim: another number of rows, another kernel, other bits."""

import torch

from turnout.measure.isolation.finding import Finding
from turnout.measure.isolation.seen import Seen
from turnout.measure.isolation.subject import Subject

__all__ = ["shape"]

_MOST = 64


def shape(subject: Subject, chance: torch.Generator, batches: int, bound: float) -> Finding:
    """How many outputs a victim has over batches of 0 to 63 other rows, the victim always first.

    Source: He, 2025, "Defeating Nondeterminism in LLM Inference" (Thinking Machines Lab).
    """
    seen, victim = Seen(bound), subject.rows(1, chance)
    for batch in range(batches):
        count = batch if batch < 4 else int(torch.randint(_MOST, (1,), generator=chance))
        seen.add(subject.run(torch.cat((victim, subject.rows(count, chance))))[0])
    fix = "no limit of capacity, and nothing that is shared by the whole batch"
    return seen.finding("shape", f"0 to {_MOST - 1} other rows after it", fix)
