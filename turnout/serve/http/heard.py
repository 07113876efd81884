"""Heard: what tickets say in the engine's thread, in the order that they say it, for one event loop."""

import asyncio
import dataclasses
import time
from collections import deque
from collections.abc import Sequence

from turnout.serve.engine import Finished, Ticket, Token

__all__ = ["Heard", "Listener"]


@dataclasses.dataclass(frozen=True, slots=True)
class Heard:
    """An event, which of the tickets it is of, and when it came, by ``time.perf_counter``."""

    index: int
    event: Token | Finished
    at_s: float


class Listener:
    """Takes events from the engine's thread without ever making it wait; the loop is woken once for many.

    What is not taken yet is bounded by what the requests may become, whoever reads it how slowly.

    Args:
        tickets: whose events they are.

    Source: none; ``call_soon_threadsafe``.
    """

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._events: deque[Heard] = deque()
        self._woken = False
        for index, ticket in enumerate(tickets):
            ticket.listen(lambda event, index=index: self._put(index, event))

    def _put(self, index: int, event: Token | Finished) -> None:
        self._events.append(Heard(index, event, time.perf_counter()))
        if not self._woken:  # else somebody was told, and has not begun to look yet
            self._woken = True
            try:
                self._loop.call_soon_threadsafe(self._ready.set)
            except RuntimeError:  # the loop is closed: nobody is left to hear it
                return

    async def more(self, timeout_s: float) -> list[Heard]:
        """What came since, at least one event; none where nothing came in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._ready.wait()
        except TimeoutError:
            return []
        self._ready.clear()
        self._woken = False  # before looking: what comes from here on wakes again
        found = list[Heard]()
        while self._events:
            found.append(self._events.popleft())
        return found
