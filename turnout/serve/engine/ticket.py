"""Ticket: what whoever asked holds of a request, to hear of its tokens, and to let it go."""

import threading
from collections.abc import Callable, Iterator

from turnout.serve.engine.request import Finished, Request, Token

__all__ = ["Ticket"]

Event = Token | Finished


class Ticket:
    """A request that was taken on: its tokens as they come, then how it ended. Any thread may use it.

    Iterate over it, which waits; or ``listen``; or call ``result``.

    Args:
        request: what was asked.
        number: which, counted from 1.
        leave: called with the ticket when it is cancelled.

    >>> ticket = Ticket(Request((1,), tokens=1), 1, leave=lambda ticket: None)
    >>> ticket.put(Token(5, "a")), ticket.put(Finished("length", 1, 0, 1))
    (None, None)
    >>> [type(event).__name__ for event in ticket], ticket.result()[1].reason
    (['Token', 'Finished'], 'length')

    Source: none; a future with parts.
    """

    def __init__(self, request: Request, number: int, *, leave: Callable[["Ticket"], object]) -> None:
        self.request, self.number, self._leave = request, number, leave
        self._events: list[Event] = []
        self._told: Callable[[Event], object] | None = None
        self._more = threading.Condition()

    @property
    def finished(self) -> Finished | None:
        """How it ended; None while it goes on."""
        last = self._events[-1] if self._events else None
        return last if isinstance(last, Finished) else None

    def listen(self, callback: Callable[[Event], object]) -> None:
        """Calls this with every event: those that were there already now, others in the engine's thread.

        It must not wait for anything, nor raise: all requests would wait with it. What it raises ends this one.
        """
        with self._more:
            for event in self._events:
                callback(event)
            self._told = callback

    def __iter__(self) -> Iterator[Event]:
        """Every event, from the first; waits for those that are not there yet."""
        at = 0
        while True:
            with self._more:
                while at == len(self._events):
                    self._more.wait()
                event = self._events[at]
            yield event
            at += 1
            if isinstance(event, Finished):
                return

    def result(self, timeout_s: float | None = None) -> tuple[tuple[Token, ...], Finished]:
        """All tokens, and how it ended; waits for that.

        Raises:
            TimeoutError: it has not ended by then.
        """
        with self._more:
            if not self._more.wait_for(lambda: self.finished is not None, timeout_s):
                raise TimeoutError(f"request {self.number} goes on after {timeout_s} s")
        end = self.finished
        assert end is not None
        return tuple(event for event in self._events if isinstance(event, Token)), end

    def cancel(self) -> None:
        """Lets it go: its slot is free with the next step, and ``Finished`` is all that follows."""
        if self.finished is None:
            self._leave(self)

    def put(self, event: Event) -> None:
        """What the engine says; nothing after ``Finished`` is taken."""
        with self._more:
            if self.finished is not None:
                return
            self._events.append(event)
            self._more.notify_all()
            told, self._told = self._told, None  # one that raises is not called again
            if told is not None:
                told(event)
                self._told = told
