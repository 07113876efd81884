"""DualPipeV: a V of stages on each device, forwards and backwards of two microbatches done together."""

from collections import deque

from turnout.decide.device.looped import check_counts
from turnout.errors import UsageError, word
from turnout.types.schedule import Action, Schedule

__all__ = ["dual_pipe_v"]


def dual_pipe_v(ranks: int, microbatches: int) -> Schedule:
    """Device r holds stages r and 2 p - 1 - r; in the middle a forward of one goes with a backward of the other.

    A device waits (p - 1)(F&B + B - 3 W), with the times of a stage and F&B of a forward and a backward together; as
    we play it that is exact where F = I = W and nothing is gained by doing them together.

    Args:
        ranks: p.
        microbatches: m, at least 2 p.

    Returns:
        The schedule.

    Raises:
        UsageError: a count below 1, or fewer microbatches than stages.

    >>> schedule = dual_pipe_v(2, 4)
    >>> schedule.count("F"), schedule.rank_of_stage, str(schedule.actions[1][6])
    (16, (0, 1, 1, 0), '(2F2;1B0)OVERLAP_F_B')

    Source: DeepSeek-AI, 2024, "DeepSeek-V3 Technical Report", and its DualPipeV of 2025, cut in half by sail.
    """
    check_counts("dual_pipe_v", ranks, microbatches)
    if microbatches < 2 * ranks:
        where, fix = "turnout.decide.device.dual_pipe_v", f"pass microbatches={2 * ranks}, or take zbv"
        allowed = f"be at least the {2 * ranks} stages"
        raise UsageError(word("microbatches", got=microbatches, allowed=allowed, where=where, fix=fix))
    orders = tuple(_order(rank, ranks, microbatches) for rank in range(ranks))
    return Schedule("DualPipeV", orders, (*range(ranks), *reversed(range(ranks))), microbatches)


def _order(rank: int, ranks: int, microbatches: int) -> tuple[Action, ...]:
    down, up, behind = rank, 2 * ranks - 1 - rank, ranks - 1 - rank
    order: list[Action] = []
    count: dict[tuple[int, str], int] = {}
    late: deque[Action] = deque()

    def make(stage: int, kind: str) -> Action:
        key = (stage, "F" if kind == "F" else "back")
        count[key] = count.get(key, 0) + 1
        return Action(stage, kind, count[key] - 1)

    def both(forward: int, backward: int) -> None:
        order.append(Action(-1, "OVERLAP_F_B", None, (make(forward, "F"), make(backward, "B"))))

    def back(stage: int, split: bool) -> None:
        order.append(make(stage, "I" if split else "B"))
        if split:
            late.append(Action(stage, "W", order[-1].microbatch))

    def weights() -> None:
        if late:
            order.append(late.popleft())

    for _ in range(2 * behind):
        order.append(make(down, "F"))
    for _ in range(rank + 1):
        order += [make(down, "F"), make(up, "F")]
    for _ in range(behind):
        back(up, True)
        weights()
        order.append(make(up, "F"))
    for step in range(microbatches - 2 * ranks + rank + 1):
        if step == 0 and not behind:  # apart, so that the gradient is not kept waiting for the forward
            order += [make(down, "F"), make(up, "B")]
        else:
            both(down, up)
        both(up, down)
    for _ in range(behind):
        back(up, False)
        both(up, down)
    for step in range(2 * (rank + 1)):  # of these backwards the later half leave their W for the gaps at the end
        back(down if step % 2 else up, step > rank)
    for _ in range(behind):
        weights()
        back(down, True)
    order += late
    return tuple(order)
