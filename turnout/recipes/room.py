"""Whether the disk and the memory have room for a conversion, known before anything is read."""

import shutil
from pathlib import Path

from turnout.errors import StorageError, UsageError, word
from turnout.measure import quantity
from turnout.measure.memory import free_memory

__all__ = ["check_room", "free_memory"]

_WHERE = "turnout convert"
# Beside the weights: the copy of a tensor, what allocators keep of what was let go, activations. Measured: docs/log.md.
_SLACK, _BESIDE = 1.1, 256 * 2**20


def check_room(out: Path, *, disk_bytes: int, memory_bytes: int) -> None:
    """Refuses a disk or a memory that is too small, before anything is read.

    Args:
        out: where the result goes.
        disk_bytes: of the result. What a conversion that was stopped left beside ``out`` counts as free.
        memory_bytes: the most that weights will take at once.

    Raises:
        StorageError: the disk of ``out``.
        UsageError: the memory that is free now.
    """
    place = out.absolute().parent
    while not place.exists():
        place = place.parent
    begun = out.with_name(out.name + ".part")
    there = sum(file.stat().st_size for file in begun.rglob("*") if file.is_file())
    need, free = int(1.01 * disk_bytes) + 2**20, shutil.disk_usage(place).free + there
    if free < need:
        fix = f"free {_bytes(need - free)}, or write to another disk"
        got, allowed = f"{_bytes(free)} free at {place}", f"have room for the {_bytes(need)} of the result"
        raise StorageError(word("the disk", got=got, allowed=allowed, where=_WHERE, fix=fix))
    memory, wanted = free_memory(), int(_SLACK * memory_bytes) + _BESIDE
    if memory is not None and memory < wanted:
        got, allowed = (
            f"{_bytes(memory)} free",
            f"hold {_bytes(wanted)}: the model before and after, and what comes along",
        )
        fix = "close other programs, use a larger machine, or read it narrower with --dtype bfloat16; "
        fix += "--force goes on all the same, and what it has finished stays if it is killed"
        raise UsageError(word("the memory", got=got, allowed=allowed, where=_WHERE, fix=fix))


def _bytes(value: float) -> str:
    return f"{quantity(value)}B" if value >= 1e3 else f"{value:.0f} B"
