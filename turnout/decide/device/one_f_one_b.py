"""1F1B: as GPipe, with each backward as early as it can be, so that at most p microbatches are held."""

from turnout.decide.device.looped import check_counts, looped_order
from turnout.types.schedule import Schedule

__all__ = ["one_f_one_b"]


def one_f_one_b(ranks: int, microbatches: int) -> Schedule:
    """Device r begins with p - r forwards and goes on with a backward and a forward in turns.

    Args:
        ranks: p, devices with a stage each.
        microbatches: m.

    Returns:
        The schedule; its bubble is GPipe's, device r holds at most p - r microbatches.

    Raises:
        UsageError: a count below 1.

    >>> print(one_f_one_b(2, 3).to_csv(), end="")
    0F0,0F1,0B0,0F2,0B1,0B2
    1F0,1B0,1F1,1B1,1F2,1B2

    Source: Narayanan et al., 2019, "PipeDream: Generalized Pipeline Parallelism for DNN Training"; the synchronous form
    is Fan et al., 2021, "DAPPLE".
    """
    check_counts("one_f_one_b", ranks, microbatches)
    orders = [looped_order(rank, ranks, 1, microbatches, hops=1, delay=None) for rank in range(ranks)]
    return Schedule("1F1B", tuple(orders), tuple(range(ranks)), microbatches)
