"""ZeroPP: pipelines over sharded parameters, which are gathered once for all microbatches of a unit."""

import itertools
from collections import deque

from turnout.decide.device.looped import check_counts
from turnout.errors import UsageError, word
from turnout.types.schedule import Action, Schedule

__all__ = ["zeropp"]


def zeropp(ranks: int, microbatches: int, *, unit: int, chunks: int = 2) -> Schedule:
    """Units of U microbatches: forward through a device's stages one after the other, then back through them.

    A stage's parameters are there only while a unit is in it: a device gathers at most 2 (v - 1) m / U + 1 stages a
    step, so that traffic falls as 1 / U while what microbatches hold grows with U. Backwards are split. In a device's
    last stage I and F go in turns, as in ZB-H2; in its first the backwards of a unit and the forwards of the next do.
    So from U = 2 p on no device waits within a unit or between two: (p - 1)(F + I - W) of a stage are left for a step.

    Args:
        ranks: p.
        microbatches: m.
        unit: U, which divides m.
        chunks: v >= 2, stages of each device; stage s is on device s mod p.

    Returns:
        The schedule, with UNSHARD and RESHARD; the next stage is gathered while one is computed.

    Raises:
        UsageError: a count below 1, one stage a device, or a unit that does not divide m.

    >>> print(zeropp(1, 1, unit=1).to_csv().replace(",", " "), end="")
    0UNSHARD 1UNSHARD 0F0 0RESHARD 1F0 0UNSHARD 1I0 1W0 1RESHARD 0I0 0W0 0RESHARD
    >>> zeropp(4, 8, unit=8).count("UNSHARD"), zeropp(4, 8, unit=1).count("UNSHARD")
    (12, 47)

    Source: Tang et al., 2024, "ZeroPP: Unleashing Exceptional Parallelism Efficiency through Tensor-Parallelism-Free
    Methodology" (as submitted later, "Adaptive Blockwise Task-interleaved Pipeline Parallelism"). The order within a
    unit is ours: the paper's is known to us from its text.
    """
    check_counts("zeropp", ranks, microbatches, chunks)
    if not isinstance(unit, int) or unit < 1 or microbatches % unit:
        near = max(each for each in range(1, microbatches + 1) if microbatches % each == 0 and each <= max(unit, 1))
        allowed, where = f"divide microbatches={microbatches}", "turnout.decide.device.zeropp"
        raise UsageError(word("unit", got=unit, allowed=allowed, where=where, fix=f"pass unit={near}"))
    if chunks < 2:
        fix = "pass chunks=2"
        raise UsageError(
            word("chunks", got=chunks, allowed="be at least 2", where="turnout.decide.device.zeropp", fix=fix)
        )
    orders = tuple(_gathered(_blocks(rank, ranks, microbatches, unit, chunks)) for rank in range(ranks))
    return Schedule("ZeroPP", orders, tuple(range(ranks)) * chunks, microbatches)


# An action with the block whose gathered parameters it uses: a W may be done in a later one.
_Line = list[tuple[Action, int]]


def _blocks(rank: int, ranks: int, microbatches: int, unit: int, chunks: int) -> list[_Line]:
    """A device's actions in blocks, each of which begins with a new stage; 2 r W are always left for later blocks."""
    stages = [rank + ranks * c for c in range(chunks)]
    units = [range(first, first + unit) for first in range(0, microbatches, unit)]
    blocks: list[_Line] = [[(Action(stages[0], "F", m), 0) for m in units[0]]]
    late: deque[tuple[Action, int]] = deque()
    for now, after in itertools.zip_longest(units, units[1:], fillvalue=range(0)):
        for stage in stages[1:-1]:
            blocks.append([(Action(stage, "F", m), len(blocks)) for m in now])
        ahead = 2 * (ranks - 1 - rank) + 1
        for stage in reversed(stages):
            own = len(blocks)
            line = [(Action(stage, "F", m), own) for m in now[:ahead]] if stage == stages[-1] else []
            coming = [Action(stage, "F", m) for m in now[ahead:]] if stage == stages[-1] else []
            begin = 0
            if stage == stages[0]:  # the next unit's forwards come down while this one's backwards go up
                coming, begin = [Action(stage, "F", m) for m in after], rank
            for place, m in enumerate(now):
                line.append((Action(stage, "I", m), own))
                late.append((Action(stage, "W", m), own))
                if len(late) > 2 * rank:
                    line.append(late.popleft())
                if begin <= place < begin + len(coming):
                    line.append((coming[place - begin], own))
            if stage == stages[0]:
                for forward in coming[max(len(now) - begin, 0) :]:
                    line += [late.popleft() for _ in range(min(2, len(late)))]
                    line.append((forward, own))
            blocks.append(line)
    blocks[-1] += late
    return blocks


def _gathered(blocks: list[_Line]) -> tuple[Action, ...]:
    """The blocks, with parameters gathered in the middle of the block before, and dropped after their last use.

    What a late W still uses when it would be gathered again stays.
    """
    stage_of = [line[0][0].stage for line in blocks]
    last = {own: (place, at) for place, line in enumerate(blocks) for at, (_, own) in enumerate(line)}
    gather = {place + 1: (place, max((len(line) + 1) // 2 - 1, 0)) for place, line in enumerate(blocks[:-1])}
    latest: dict[int, int] = {}
    for own, stage in enumerate(stage_of):
        before = latest.get(stage)
        if before is not None and last[before] >= gather[own]:
            del gather[own]
            last[own] = max(last[own], last[before])
            del last[before]
        latest[stage] = own
    gathers = {where: stage_of[own] for own, where in gather.items()}
    drops = {where: stage_of[own] for own, where in last.items()}
    order = [Action(stage_of[0], "UNSHARD")]
    for place, line in enumerate(blocks):
        for at, (action, _) in enumerate(line):
            if (place, at) in gathers:
                order.append(Action(gathers[place, at], "UNSHARD"))
            order.append(action)
            if (place, at) in drops:
                order.append(Action(drops[place, at], "RESHARD"))
    return tuple(order)
