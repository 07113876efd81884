"""What everybody may see of a server: sums, and of what many made, never of what one just did."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from turnout.serve.engine import EngineStats

__all__ = ["Shared"]

# Counts of experts go on by at least so many tokens: fewer would be one user's routes, which say what the text is.
TOKENS = 1024


class Shared:
    """The part of an engine's numbers that strangers may share.

    Which experts a text takes gives the text away (its routes are a fingerprint), and so do counts of experts or of
    cache misses that can be read before and after a token. Where strangers share a server, such counts therefore stand
    still until many tokens more have been counted; ``live`` is for a server with one user, or one circle of them.

    Args:
        live: whether counts are shown as they are.

    >>> shared = Shared(live=False)
    >>> few = EngineStats(alive=True, slots=4, tokens_out=3, expert_load=((1, 2),))
    >>> shared.of(few)["load"]
    [[0, 0]]
    >>> many = EngineStats(alive=True, slots=4, tokens_out=2000, expert_load=((900, 1100),))
    >>> shared.of(many)["load"]
    [[900, 1100]]
    >>> shared.of(dataclasses.replace(many, tokens_out=2001, expert_load=((901, 1100),)))["load"]
    [[900, 1100]]

    Source: none; for routes as a side channel, Yona et al., 2024.
    """

    def __init__(self, *, live: bool) -> None:
        self._live, self._at = live, 0
        self._load: list[list[int]] = []
        self._counts: Mapping[str, Any] = {}

    def of(self, stats: EngineStats) -> dict[str, Any]:
        """What is shown of these numbers.

        Args:
            stats: of ``Engine.stats``.
        """
        made = stats.tokens_in + stats.tokens_out
        if self._live or made - self._at >= TOKENS:
            self._load, self._counts = [list(row) for row in stats.expert_load], dict(stats.counts)
            self._at = made
        elif not self._load:
            self._load = [[0] * len(row) for row in stats.expert_load]
        told = {field.name: getattr(stats, field.name) for field in dataclasses.fields(stats)}
        return {name: value for name, value in told.items() if name != "expert_load"} | {
            "load": self._load,
            "counts": dict(self._counts),
            "live": self._live,
        }
