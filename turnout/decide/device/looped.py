"""Looped order: a few forwards, then one forward and one backward in turns; what 1F1B and most after it are made of."""

from turnout.errors import UsageError, word
from turnout.types.schedule import Action

__all__ = ["check_counts", "looped_order", "rounds"]


def looped_order(
    rank: int, ranks: int, chunks: int, microbatches: int, *, hops: int, delay: int | None
) -> tuple[Action, ...]:
    """What a device does that holds stages rank, rank + R, rank + 2 R, ...

    Microbatches go through a device's stages in rounds of about R: all of a round through one stage, then through the
    next. The device begins with (chunks - 1) rounds and ``hops`` forwards for each device behind it, goes on with one
    forward and one backward in turns, and ends with the backwards that are left.

    Args:
        rank: the device, in [0, ranks).
        ranks: R.
        chunks: how many stages each device holds.
        microbatches: how many there are; a multiple of the number of rounds.
        hops: how many forwards a device begins with more than the one behind it.
        delay: how many I a device does before its first W; None for B in one.
    """
    size = microbatches // rounds(ranks, microbatches)
    total = chunks * microbatches
    chunk_N = [(step // size) % chunks for step in range(total)]
    microbatch_N = [step // (size * chunks) * size + step % size for step in range(total)]
    forward = [(c * ranks + rank, m) for c, m in zip(chunk_N, microbatch_N, strict=True)]
    backward = [((chunks - 1 - c) * ranks + rank, m) for c, m in zip(chunk_N, microbatch_N, strict=True)]
    ahead = min((chunks - 1) * size + hops * (ranks - 1 - rank), total)
    order = [Action(stage, "F", m) for stage, m in forward[:ahead]]
    for step, (stage, m) in enumerate(backward):
        if ahead + step < total:
            order.append(Action(forward[ahead + step][0], "F", forward[ahead + step][1]))
        order.append(Action(stage, "B" if delay is None else "I", m))
        if delay is not None and step >= delay:
            order.append(Action(backward[step - delay][0], "W", backward[step - delay][1]))
    late = backward[max(total - delay, 0) :] if delay else []
    return (*order, *(Action(stage, "W", m) for stage, m in late))


def rounds(ranks: int, microbatches: int) -> int:
    """How many rounds the microbatches go through a device's stages in."""
    return max(1, microbatches // ranks)


def check_counts(name: str, ranks: int, microbatches: int, chunks: int = 1, *, whole_rounds: bool = False) -> None:
    """Refuses counts below 1, and microbatches that are not the same number in every round where they have to be.

    Raises:
        UsageError: names what is wrong.
    """
    where = f"turnout.decide.device.{name}"
    for what, got in (("ranks", ranks), ("microbatches", microbatches), ("chunks", chunks)):
        if not isinstance(got, int) or isinstance(got, bool) or got < 1:
            fix = f"pass {what}=1 at least"
            raise UsageError(word(what, got=got, allowed="be a whole number of at least 1", where=where, fix=fix))
    many = rounds(ranks, microbatches)
    if whole_rounds and microbatches % many:
        fix = f"pass microbatches={microbatches // many * many}"
        allowed = f"be a multiple of the {many} rounds of about {ranks}"
        raise UsageError(word("microbatches", got=microbatches, allowed=allowed, where=where, fix=fix))
