"""Plays blocks one task at a time, in parts of several sizes, to see what each kind of task takes."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch

from turnout.run.blocks.block import Played
from turnout.types import BlockSchedule, BlockTask

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["over_ranks", "profile_blocks", "serial"]


class Closes(Protocol):
    """What plays a schedule, until it is closed."""

    def close(self) -> None:
        """Ends it."""


Player = TypeVar("Player", bound=Closes)


def serial(
    blocks: int, parts: int, *, dense: Sequence[int] = (), expert: Sequence[int] = (), halved: bool = False
) -> BlockSchedule:
    """The schedule that does one thing at a time: one chunk after another through all blocks, then back, then sums.

    >>> " ".join(map(str, serial(1, 1, dense=(8,)).wire))
    "D0.0 C0.0 C'0.0 D'0.0 Ra0.0"

    Source: none; no overlap at all.
    """
    back = ("C'", "Ex", "Ew", "D'", "G'", "Ax", "Aw") if halved else ("C'", "E'", "D'", "G'", "A'")
    chunks, layers = range(parts), range(blocks)
    tasks = [BlockTask(kind, b, c) for c in chunks for b in layers for kind in "AGDEC"]
    tasks += [BlockTask(kind, b, c) for c in chunks for b in reversed(layers) for kind in back]
    sizes = {"Re": expert, "Ra": dense}
    tasks += [BlockTask(kind, b, p) for b in reversed(layers) for kind, each in sizes.items() for p in range(len(each))]
    compute, wire = (tuple(task for task in tasks if task.resource == name) for name in ("compute", "wire"))
    shape: dict[str, Any] = {"dense_bytes": tuple(dense), "expert_bytes": tuple(expert), "method": "serial"}
    return BlockSchedule(blocks, parts, parts, compute, wire, **shape)


def profile_blocks(
    player: Callable[[BlockSchedule], Player],
    play: Callable[[Player], Played],
    *,
    blocks: int,
    dense_bytes: int,
    expert_bytes: int = 0,
    degrees: Sequence[int] = (1, 2, 4),
    repeats: int = 3,
) -> list[tuple[BlockSchedule, Mapping[BlockTask, float]]]:
    """What each task took in serial steps of several numbers of chunks, in halves and whole, over all ranks.

    All ranks call it together. The steps compute real gradients, which are added to the parameters' ``grad``: clear it
    after. A first step of each schedule is not counted.

    Args:
        player: makes the player of a schedule.
        play: takes one step with a player.
        blocks: how many there are.
        dense_bytes: of a block's dense gradient, as it is summed; 0 for no sum.
        expert_bytes: of its experts' gradient.
        degrees: numbers of chunks, and of pieces of a gradient.
        repeats: steps of each.

    Returns:
        Schedules, and the seconds of each task: what ``turnout.measure.fit_block_costs`` takes.

    Source: Pan et al., 2025, "FSMoE": costs are measured online, on the cluster that trains.
    """
    found = []
    for parts in degrees:
        for halved in (False, True):
            sizes = {"dense": _cut(dense_bytes, parts), "expert": _cut(expert_bytes, parts)}
            schedule = serial(blocks, parts, halved=halved, **sizes)
            playing = player(schedule)
            play(playing)
            found += [(schedule, over_ranks(schedule, play(playing))) for _ in range(repeats)]
            playing.close()
    return found


def over_ranks(schedule: BlockSchedule, played: Played, group: "ProcessGroup | None" = None) -> dict[BlockTask, float]:
    """The seconds of each task, the same on every rank: on the chip of the slowest, on the wire of the last to come.

    What is on the wire lasts, for those who are early, until the last one comes; that is not what it takes.
    """
    import torch.distributed as dist

    tasks = schedule.tasks
    spans = torch.tensor([played.times[task] for task in tasks], dtype=torch.float64)
    mine = spans[:, 1] - spans[:, 0]
    every = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, mine, group=group)
    seconds = torch.stack(every)
    most, least = seconds.amax(0).tolist(), seconds.amin(0).tolist()
    return {
        task: (most if task.resource == "compute" else least)[number] for number, task in enumerate(tasks)
    }  # fmt: skip


def _cut(size: int, parts: int) -> tuple[int, ...]:
    """So many bytes in parts of whole blocks of 512, but for the last."""
    ends = [part * size // parts // 512 * 512 for part in range(parts)] + [size]
    return tuple(end - start for start, end in itertools.pairwise(ends) if end > start)
