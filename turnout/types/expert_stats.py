"""ExpertStats: what a cache of experts has done so far."""

import dataclasses
from typing import Any

from turnout.fields import plain

__all__ = ["ExpertStats"]


@dataclasses.dataclass(frozen=True)
class ExpertStats:
    """Counts since the cache was made.

    Args:
        slots: how many experts fit.
        experts: how many there are in all layers.
        expert_bytes: of one.
        hits: experts that a pass asked for and that were held, or already on their way.
        misses: those that it had to have fetched.
        waits_s: how long passes stood still for experts.
        fetched_bytes: what was read of files, for passes and ahead of them.
        prefetched: experts that were asked for ahead of a pass.
        prefetched_used: those of them that a pass then asked for before they gave up their slots.
        evicted: experts that gave up their slots.
        layer_hits: hits of each layer that has experts.
        layer_misses: likewise misses.

    >>> ExpertStats(slots=2, experts=8, expert_bytes=1024, hits=3, misses=1).hit_rate
    0.75

    Source: none; plain bookkeeping.
    """

    slots: int
    experts: int
    expert_bytes: int
    hits: int = 0
    misses: int = 0
    waits_s: float = 0.0
    fetched_bytes: int = 0
    prefetched: int = 0
    prefetched_used: int = 0
    evicted: int = 0
    layer_hits: tuple[int, ...] = ()
    layer_misses: tuple[int, ...] = ()

    @property
    def memory_bytes(self) -> int:
        """Of all slots."""
        return self.slots * self.expert_bytes

    @property
    def hit_rate(self) -> float:
        """The share of hits; 1 before anything was asked for."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else 1.0

    def to_json_dict(self) -> dict[str, Any]:
        """As JSON values, with the hit rate."""
        return {**plain(self), "hit_rate": self.hit_rate}

    def __str__(self) -> str:
        used = f", {self.prefetched_used:,} of {self.prefetched:,} fetched ahead were used" if self.prefetched else ""
        return (
            f"{self.slots:,} of {self.experts:,} experts fit; {self.hits:,} hits, {self.misses:,} misses "
            f"({self.hit_rate:.1%}), {self.fetched_bytes / 1e6:,.1f} MB read, {self.waits_s:.2f} s waited{used}"
        )
