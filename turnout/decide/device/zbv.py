"""ZBV: a V of stages on each device and B split: no bubble at 1F1B's memory where F, I and W take as long."""

from turnout.decide.device.looped import check_counts
from turnout.types.schedule import Action, Schedule

__all__ = ["zbv"]


def zbv(ranks: int, microbatches: int) -> Schedule:
    """Device r holds stages r and 2 p - 1 - r, so that the first backward comes back to where the loss is.

    Args:
        ranks: p.
        microbatches: m; with fewer than 2 p - 1 there is a bubble.

    Returns:
        The schedule.

    Raises:
        UsageError: a count below 1.

    >>> schedule = zbv(2, 4)
    >>> schedule.rank_of_stage, [str(action) for action in schedule.actions[1][:6]]
    ((0, 1, 1, 0), ['1F0', '2F0', '1F1', '2F1', '2I0', '2W0'])

    Source: Qi et al., 2024, "Zero Bubble Pipeline Parallelism", section 6; the order is torch's ZBVZeroBubble.
    """
    check_counts("zbv", ranks, microbatches)
    orders = tuple(
        tuple(a for a in _order(r, ranks, max(microbatches, 2 * ranks - 1)) if (a.microbatch or 0) < microbatches)
        for r in range(ranks)
    )
    return Schedule("ZBVZeroBubble", orders, (*range(ranks), *reversed(range(ranks))), microbatches)


def _order(rank: int, ranks: int, microbatches: int) -> list[Action]:
    stage = {"down": rank, "up": 2 * ranks - 1 - rank}
    count: dict[tuple[str, str], int] = {}
    order: list[Action] = []

    def put(way: str, kinds: str) -> None:
        for kind in kinds:
            count[way, kind] = count.get((way, kind), 0) + 1
            order.append(Action(stage[way], kind, count[way, kind] - 1))

    for _ in range(2 * (ranks - rank) - 1):
        put("down", "F")
    for _ in range(rank):
        put("up", "F")
        put("down", "F")
    for _ in range(ranks - rank):
        put("up", "FIW")
    while count["up", "F"] < microbatches:
        if count["down", "F"] < microbatches:
            put("down", "F")
        put("down", "IW")
        put("up", "FIW")
    for _ in range(rank):
        put("down", "I")
        put("up", "I")
    for _ in range(ranks - rank):
        put("down", "IW")
    for way in ("up", "down"):
        for _ in range(microbatches - count.get((way, "W"), 0)):
            put(way, "W")
    return order
