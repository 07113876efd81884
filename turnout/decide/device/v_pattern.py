"""V-Half and V-Min: a V of stages on each device and a pattern whose microbatches live short: less memory than 1F1B."""

import itertools

from turnout.decide.device.looped import check_counts
from turnout.solve.pipeline import stage_needs
from turnout.solve.timeline import ends
from turnout.types.schedule import Action, Schedule

__all__ = ["v_half", "v_min"]

_SLOTS = 6  # F, I and W of two stages: a device's work for one microbatch
# How many slots a microbatch takes from device to device: forward down and up the V, backward down and up.
_HALF, _MIN = (2, 1, 2, 1), (1, 1, 1, 1)


def v_half(ranks: int, microbatches: int) -> Schedule:
    """About half of 1F1B's memory, at about half of its bubble where F, I and W take as long.

    Args:
        ranks: p; device r holds stages r and 2 p - 1 - r.
        microbatches: m.

    Returns:
        The schedule.

    Raises:
        UsageError: a count below 1.

    >>> v_half(4, 8).count("W")
    64

    Source: Qi et al., 2024, "Pipeline Parallelism with Controllable Memory"; the gaps of the pattern are the smallest
    without a collision, found by trying.
    """
    return _repeated("VHalf", ranks, microbatches, _HALF)


def v_min(ranks: int, microbatches: int) -> Schedule:
    """About a third of 1F1B's memory, the least of a pattern in a V.

    Args:
        ranks: p; device r holds stages r and 2 p - 1 - r.
        microbatches: m.

    Returns:
        The schedule.

    Raises:
        UsageError: a count below 1.

    >>> v_min(4, 8).count("W")
    64

    Source: Qi et al., 2024, "Pipeline Parallelism with Controllable Memory"; the gaps of the pattern are the smallest
    without a collision, found by trying.
    """
    return _repeated("VMin", ranks, microbatches, _MIN)


def _repeated(name: str, ranks: int, microbatches: int, hops: tuple[int, int, int, int]) -> Schedule:
    """The pattern of one microbatch, every six slots anew."""
    check_counts("v_half" if name == "VHalf" else "v_min", ranks, microbatches)
    orders = []
    for rank, slots in enumerate(_pattern(ranks, hops)):
        stage = {"down": rank, "up": 2 * ranks - 1 - rank}
        line = [
            (slot + _SLOTS * m, Action(stage[way], kind, m))
            for (way, kind), slot in slots.items()
            for m in range(microbatches)
        ]
        orders.append([action for _, action in sorted(line)])
    holders = (*range(ranks), *reversed(range(ranks)))
    return Schedule(name, _late_weights(orders, holders, microbatches), holders, microbatches)


def _late_weights(
    orders: list[list[Action]], holders: tuple[int, ...], microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """The same with the W behind a device's last F where it would wait for the next I: nothing is held longer by it."""
    tails = [max(place for place, action in enumerate(line) if action.kind == "F") + 1 for line in orders]
    late = [[a for a in line[tail:] if a.kind == "W"] for line, tail in zip(orders, tails, strict=True)]
    early = [[a for a in line if a not in set(late[rank])] for rank, line in enumerate(orders)]
    stages = len(holders)
    number = {a: a.stage * microbatches + (a.microbatch or 0) for line in orders for a in line}
    task = {a: number[a] + {"F": 0, "I": 1, "W": 2}[a.kind] * stages * microbatches for a in number}
    needs = stage_needs(holders, microbatches, 0.0)
    end = ends([[task[a] for a in line] for line in early], [1.0] * len(needs), needs)
    assert end is not None
    filled = []
    for line, tail, waiting in zip(early, tails, late, strict=True):
        order, now = list(line[:tail]), end[task[line[tail - 1]]]
        for action in line[tail:]:
            begin = end[task[action]] - 1.0
            while now < begin and waiting and any(a.kind == "I" and a[::2] == waiting[0][::2] for a in order):
                order.append(waiting.pop(0))
                now += 1.0
            order.append(action)
            now = begin + 1.0
        filled.append((*order, *waiting))
    return tuple(filled)


def _pattern(ranks: int, hops: tuple[int, int, int, int]) -> list[dict[tuple[str, str], int]]:
    """When a microbatch's actions are, for each device: with the smallest turns for which no two share a slot."""
    some = range(1, _SLOTS + 1)
    options = itertools.product(some, some, some)
    for turns in sorted(options, key=lambda turn: (sum(turn), turn)):
        pattern = [_slots(rank, ranks, hops, turns) for rank in range(ranks)]
        if all(len({slot % _SLOTS for slot in slots.values()}) == 4 for slots in pattern):
            break
    else:
        raise AssertionError("no turns without a collision")
    for slots in pattern:
        left = sorted(set(range(_SLOTS)) - {slot % _SLOTS for slot in slots.values()})
        begin = {way: slots[way, "I"] + 1 for way in ("up", "down")}
        delay = {way: [(residue - begin[way]) % _SLOTS for residue in left] for way in begin}
        straight = delay["up"][0] + delay["down"][1] <= delay["up"][1] + delay["down"][0]
        for way, pick in (("up", 0 if straight else 1), ("down", 1 if straight else 0)):
            slots[way, "W"] = begin[way] + delay[way][pick]
    return pattern


def _slots(
    rank: int, ranks: int, hops: tuple[int, int, int, int], turns: tuple[int, int, int]
) -> dict[tuple[str, str], int]:
    far, behind = ranks - 1, ranks - 1 - rank
    up = hops[0] * far + turns[0]  # on the last device; the loss is on the first
    back = up + hops[1] * far + turns[1]
    home = back + hops[2] * far + turns[2]
    return {
        ("down", "F"): hops[0] * rank,
        ("up", "F"): up + hops[1] * behind,
        ("up", "I"): back + hops[2] * rank,
        ("down", "I"): home + hops[3] * behind,
    }
