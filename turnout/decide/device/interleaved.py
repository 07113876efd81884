"""Interleaved 1F1B and looped breadth-first: every device holds several stages, which divides the bubble."""

from turnout.decide.device.looped import check_counts, looped_order
from turnout.types.schedule import Action, Schedule

__all__ = ["interleaved", "looped_breadth_first"]


def interleaved(ranks: int, microbatches: int, *, chunks: int = 2) -> Schedule:
    """1F1B over v stages a device: the bubble is (p - 1) / (v m + p - 1), for v times the messages.

    Args:
        ranks: p.
        microbatches: m, a multiple of the max(1, m // p) rounds that they go in.
        chunks: v, stages of each device; stage s is on device s mod p.

    Returns:
        The schedule.

    Raises:
        UsageError: a count below 1, or microbatches that do not make rounds.

    >>> print(interleaved(2, 2).to_csv(), end="")
    0F0,0F1,2F0,2F1,2B0,2B1,0B0,0B1
    1F0,1F1,3F0,3B0,3F1,3B1,1B0,1B1

    Source: Narayanan et al., 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM".
    As torch has it, m need not be a multiple of p.
    """
    check_counts("interleaved", ranks, microbatches, chunks, whole_rounds=True)
    orders = [looped_order(rank, ranks, chunks, microbatches, hops=2, delay=None) for rank in range(ranks)]
    return Schedule("Interleaved1F1B", tuple(orders), tuple(range(ranks)) * chunks, microbatches)


def looped_breadth_first(ranks: int, microbatches: int, *, chunks: int = 2) -> Schedule:
    """All microbatches through a device's first stage, then through its next; then all of it backwards.

    Args:
        ranks: p.
        microbatches: m.
        chunks: v, stages of each device; stage s is on device s mod p.

    Returns:
        The schedule; each stage's parameters are gathered twice a step, however many microbatches there are.

    Raises:
        UsageError: a count below 1.

    >>> print(looped_breadth_first(1, 2).to_csv(), end="")
    0F0,0F1,1F0,1F1,1B1,1B0,0B1,0B0

    Source: Lamy-Poirier, 2023, "Breadth-First Pipeline Parallelism".
    """
    check_counts("looped_breadth_first", ranks, microbatches, chunks)
    orders = []
    for rank in range(ranks):
        stages = range(rank, ranks * chunks, ranks)
        forward = [Action(stage, "F", m) for stage in stages for m in range(microbatches)]
        orders.append((*forward, *(Action(f.stage, "B", f.microbatch) for f in reversed(forward))))
    return Schedule("LoopedBFS", tuple(orders), tuple(range(ranks)) * chunks, microbatches)
