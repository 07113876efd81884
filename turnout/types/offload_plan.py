"""OffloadPlan: which blocks of a network a device holds at once, and where the others are kept meanwhile."""

import dataclasses

from turnout.errors import UsageError, word

__all__ = ["OffloadPlan"]


@dataclasses.dataclass(frozen=True)
class OffloadPlan:
    """How the blocks of a network take turns on a device.

    Args:
        resident: blocks whose parameters are on the device at once, with those that are on their way to it.
        prefetch: how many blocks ahead of the one that computes are fetched; less than ``resident``.
        on_disk: the blocks whose parameters and optimizer state are kept on disk; those of the others stay in the
            host's memory.
        overlap: whether a block's optimizer step runs on the host while the backward pass goes on below it; without,
            all of them run after it. The numbers are the same.

    Raises:
        UsageError: no block resident, as many fetched ahead, or an unlikely block.

    >>> OffloadPlan(resident=2, prefetch=1).overlap
    True

    Source: Abbasi et al., 2024, "Superpipeline", for the two numbers; Liao et al., 2024, "Adding NVMe SSDs to Enable
    and Accelerate 100B Model Fine-tuning on a Single GPU" (Fuyou), for the disk and the overlapped step.
    """

    resident: int = 2
    prefetch: int = 1
    on_disk: tuple[int, ...] = ()
    overlap: bool = True

    def __post_init__(self) -> None:
        where = "turnout.types.OffloadPlan"
        if not _whole(self.resident) or self.resident < 1:
            fix = "pass resident=2"
            raise UsageError(word("resident", got=self.resident, allowed="be at least 1", where=where, fix=fix))
        if not _whole(self.prefetch) or not 0 <= self.prefetch < self.resident:
            allowed = f"be at least 0 and below resident, {self.resident}"
            fix = "pass prefetch=0" if self.resident == 1 else f"pass prefetch={self.resident - 1}"
            raise UsageError(word("prefetch", got=self.prefetch, allowed=allowed, where=where, fix=fix))
        if not all(_whole(block) and block >= 0 for block in self.on_disk) or (
            len(set(self.on_disk)) < len(self.on_disk)
        ):
            allowed, fix = "be numbers of blocks, each once", "pass tuple(range(4)) for the first four"
            raise UsageError(word("on_disk", got=self.on_disk, allowed=allowed, where=where, fix=fix))

    def check(self, blocks: int, *, where: str) -> None:
        """That it is of a network of so many blocks.

        Raises:
            UsageError: a block on disk that there is not.
        """
        strange = [block for block in self.on_disk if block >= blocks]
        if strange:
            fix, allowed = f"leave out {strange[0]}", f"be of the network's {blocks} blocks"
            raise UsageError(word("on_disk", got=self.on_disk, allowed=allowed, where=where, fix=fix))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
