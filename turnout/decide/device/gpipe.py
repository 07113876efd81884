"""GPipe: all forwards, then all backwards."""

from turnout.decide.device.looped import check_counts
from turnout.types.schedule import Action, Schedule

__all__ = ["gpipe"]


def gpipe(ranks: int, microbatches: int) -> Schedule:
    """Every device does all its forwards, then all its backwards: the bubble is (p - 1) / (m + p - 1).

    Args:
        ranks: p, devices with a stage each.
        microbatches: m.

    Returns:
        The schedule; every device holds all m microbatches at its peak.

    Raises:
        UsageError: a count below 1.

    >>> print(gpipe(2, 2).to_csv(), end="")
    0F0,0F1,0B0,0B1
    1F0,1F1,1B0,1B1

    Source: Huang et al., 2019, "GPipe: Efficient Training of Giant Neural Networks using Pipeline Parallelism".
    """
    check_counts("gpipe", ranks, microbatches)
    kinds = [(kind, m) for kind in "FB" for m in range(microbatches)]
    orders = tuple(tuple(Action(rank, kind, m) for kind, m in kinds) for rank in range(ranks))
    return Schedule("GPipe", orders, tuple(range(ranks)), microbatches)
