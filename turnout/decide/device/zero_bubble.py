"""Zero bubble by hand: the gradients of weights wait for nobody, and fill the gaps of 1F1B."""

from turnout.decide.device.looped import check_counts, looped_order
from turnout.types.schedule import Schedule

__all__ = ["interleaved_zero_bubble", "zb_h1", "zb_h2"]


def zb_h1(ranks: int, microbatches: int) -> Schedule:
    """1F1B with B split, W late by as many microbatches as memory has room for: the bubble is (p - 1)(F + I - W).

    Args:
        ranks: p, devices with a stage each.
        microbatches: m.

    Returns:
        The schedule; no device holds more than the first of 1F1B.

    Raises:
        UsageError: a count below 1.

    >>> print(zb_h1(2, 3).to_csv(), end="")
    0F0,0F1,0I0,0W0,0F2,0I1,0W1,0I2,0W2
    1F0,1I0,1F1,1I1,1W0,1F2,1I2,1W1,1W2

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", section 2.1.
    """
    check_counts("zb_h1", ranks, microbatches)
    orders = [looped_order(rank, ranks, 1, microbatches, hops=1, delay=rank) for rank in range(ranks)]
    return Schedule("ZBH1", tuple(orders), tuple(range(ranks)), microbatches)


def zb_h2(ranks: int, microbatches: int) -> Schedule:
    """Twice as many forwards ahead as ZB-H1: the bubble is (p - 1)(F + I - 2 W), nothing where all are equal.

    That holds of devices' spans from m >= 2 p - 1 on; a barrier after the step costs (p - 1) F.

    Args:
        ranks: p, devices with a stage each.
        microbatches: m.

    Returns:
        The schedule; the first device holds 2 p - 1 microbatches.

    Raises:
        UsageError: a count below 1.

    >>> print(zb_h2(2, 3).to_csv(), end="")
    0F0,0F1,0F2,0I0,0W0,0I1,0W1,0I2,0W2
    1F0,1I0,1F1,1I1,1F2,1I2,1W0,1W1,1W2

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", section 2.2.
    """
    check_counts("zb_h2", ranks, microbatches)
    orders = [looped_order(rank, ranks, 1, microbatches, hops=2, delay=2 * rank) for rank in range(ranks)]
    return Schedule("ZBH2", tuple(orders), tuple(range(ranks)), microbatches)


def interleaved_zero_bubble(ranks: int, microbatches: int, *, chunks: int = 2) -> Schedule:
    """ZB-H1 over several stages a device.

    Args:
        ranks: p.
        microbatches: m, a multiple of the max(1, m // p) rounds that they go in.
        chunks: v, stages of each device; stage s is on device s mod p.

    Returns:
        The schedule.

    Raises:
        UsageError: a count below 1, or microbatches that do not make rounds.

    >>> interleaved_zero_bubble(2, 4).count("W")
    16

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism"; the interleaved form is torch's InterleavedZeroBubble.
    """
    check_counts("interleaved_zero_bubble", ranks, microbatches, chunks, whole_rounds=True)
    orders = [looped_order(rank, ranks, chunks, microbatches, hops=1, delay=rank) for rank in range(ranks)]
    return Schedule("InterleavedZeroBubble", tuple(orders), tuple(range(ranks)) * chunks, microbatches)
