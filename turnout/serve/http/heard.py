"""Heard: what tickets say in the engine's thread, in the order that they say it, for one event loop."""

import asyncio
import dataclasses
import time
import weakref
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


class _Bell:
    """Wakes one event loop for all its listeners, once for all that came before it looks."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._due, self._rung = weakref.ref(loop), deque[asyncio.Event](), False

    def ring(self, ready: asyncio.Event) -> None:
        """From any thread: this is to be set in the loop's own."""
        self._due.append(ready)
        if self._rung:  # else somebody was told, and has not begun to look yet
            return
        self._rung = True
        loop = self._loop()
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._answer)
        except RuntimeError:  # the loop is closed: nobody is left to hear it
            return

    def _answer(self) -> None:
        self._rung = False  # before looking: what comes from here on wakes again
        while self._due:
            self._due.popleft().set()


_BELLS: "weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Bell]" = weakref.WeakKeyDictionary()


class Listener:
    """Takes events from the engine's thread without ever making it wait; the loop is woken once for many.

    What is not taken yet is bounded by what the requests may become, whoever reads it how slowly.

    Args:
        tickets: whose events they are.

    Source: none; ``call_soon_threadsafe``.
    """

    def __init__(self, tickets: Sequence[Ticket]) -> None:
        self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
        self._bell = _BELLS.setdefault(self._loop, _Bell(self._loop))
        self._events: deque[Heard] = deque()
        self._woken = False
        self._until_s: float | None = None  # until when somebody waits
        self._timer: asyncio.TimerHandle | None = None
        for index, ticket in enumerate(tickets):
            ticket.listen(lambda event, index=index: self._put(index, event))

    def _put(self, index: int, event: Token | Finished) -> None:
        self._events.append(Heard(index, event, time.perf_counter()))
        if not self._woken:  # else somebody was told, and has not begun to look yet
            self._woken = True
            self._bell.ring(self._ready)

    async def more(self, timeout_s: float) -> list[Heard]:
        """What came since, at least one event; none where nothing came in time."""
        self._until_s = self._loop.time() + timeout_s
        if self._timer is not None and self._timer.when() > self._until_s:
            self._timer.cancel()
            self._timer = None
        if self._timer is None:  # one for many calls: they seldom wait for long
            self._timer = self._loop.call_at(self._until_s, self._look)
        await self._ready.wait()
        self._until_s = None
        self._ready.clear()
        self._woken = False  # before looking: what comes from here on wakes again
        found = list[Heard]()
        while self._events:
            found.append(self._events.popleft())
        return found

    def close(self) -> None:
        """Nobody waits any more."""
        self._until_s = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self) -> None:
        self._timer = None
        if self._until_s is None:
            return
        if self._loop.time() >= self._until_s:
            self._ready.set()
        else:
            self._timer = self._loop.call_at(self._until_s, self._look)
