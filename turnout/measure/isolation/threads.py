"""Probe: another number of threads, which a server may have another day."""

import torch

from turnout.measure.isolation.finding import Finding
from turnout.measure.isolation.seen import Seen
from turnout.measure.isolation.subject import Subject

__all__ = ["threads"]

_COUNTS = (1, 2, 4)


def threads(subject: Subject, chance: torch.Generator, batches: int, bound: float) -> Finding:
    """Whether the output depends on how many threads torch has; put back afterwards.

    Source: none; sums split among threads are other sums.
    """
    if getattr(subject, "device", torch.device("cpu")).type != "cpu":
        return Finding("threads", "not run", 0, 0, 0.0, "it does not run on a CPU")
    seen, before, row_BS = Seen(bound), torch.get_num_threads(), subject.rows(8, chance)
    try:
        for count in _COUNTS:
            torch.set_num_threads(count)
            seen.add(subject.run(row_BS)[-1])
    finally:
        torch.set_num_threads(before)
    what = f"the same batch with {', '.join(map(str, _COUNTS))} threads"
    fix = "always as many threads: OMP_NUM_THREADS"
    return seen.finding("threads", what, fix, bits=fix)
