"""Answer: the texts of a request, whole or in events as they come, in the words of an endpoint."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from turnout.serve.engine import Finished, Request, Ticket, Token
from turnout.serve.http.errors import ApiError
from turnout.serve.http.heard import Heard, Listener
from turnout.serve.http.made import Made, trouble
from turnout.serve.http.service import Asked, Service

__all__ = ["Pieces", "Style", "answer", "event"]

# An event stream says so often that it is there, so that nobody between cuts it off.
_PULSE_S = 15.0
_JSON = json.JSONEncoder(separators=(",", ":")).encode
# Stands where a piece of text comes to stand; nobody's text is compared with it.
_HERE = "\0here\0"


class Style(Protocol):
    """How an endpoint says what is made; each method but ``whole`` gives events for a stream.

    Source: the events of OpenAI's API.
    """

    def opening(self) -> Iterable[bytes]:
        """Before anything."""

    def piece(self, made: Made, token: Token) -> Iterable[bytes]:
        """One token more, which ``made`` has already."""

    def ended(self, made: Made) -> Iterable[bytes]:
        """One of the texts has ended."""

    def closing(self, texts: Sequence[Made]) -> Iterable[bytes]:
        """All have."""

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """They never will."""

    def whole(self, texts: Sequence[Made]) -> dict[str, Any]:
        """All of it."""


def event(body: Mapping[str, Any], name: str = "") -> bytes:
    r"""A server-sent event; nothing but ASCII, so that no client takes a character for the end of a line.

    >>> event({"a": "\u2028"})
    b'data: {"a":"\\u2028"}\n\n'

    Source: the HTML standard, section 9.2.
    """
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {_JSON(body)}\n\n".encode()


class Pieces:
    r"""Events that differ in one text alone: what stands around it is written once for each of a request's texts.

    Args:
        body: that of an event, by the number of the request's text and what comes in its place.

    >>> pieces = Pieces(lambda index, text: {"index": index, "text": text})
    >>> pieces.event(1, "a"), pieces.event(1, '"') == event({"index": 1, "text": '"'})
    (b'data: {"index":1,"text":"a"}\n\n', True)

    Source: none; a template.
    """

    def __init__(self, body: Callable[[int, str], Mapping[str, Any]]) -> None:
        self._body, self._around = body, dict[int, tuple[bytes, bytes]]()

    def event(self, index: int, text: str) -> bytes:
        """With this text, as ``event`` would write it."""
        if index not in self._around:
            before, _, after = event(self._body(index, _HERE)).rpartition(_JSON(_HERE).encode())
            self._around[index] = before, after
        before, after = self._around[index]
        return before + _JSON(text).encode() + after


async def answer(
    service: Service, request: Any, asked: Asked, requests: Sequence[Request], style: Style, *, copies: int = 1
) -> Any:
    """The response to a request.

    Args:
        service: the model and its limits.
        request: of HTTP.
        asked: its fields.
        requests: what the engine is asked, in the order of the texts.
        style: in whose words.
        copies: how many texts there are of each prompt, one after the other.

    Returns:
        A response of Starlette.

    Raises:
        ApiError: nothing can be answered.

    Source: none; plain bookkeeping.
    """
    from fastapi.responses import JSONResponse, Response, StreamingResponse

    tickets = service.submit(requests, request)
    run = _Run(service, asked, tickets, copies)
    if asked.body.get("stream"):
        kept = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        kept |= {"X-Turnout-Request": ",".join(str(ticket.number) for ticket in tickets)}
        return StreamingResponse(run.events(style), media_type="text/event-stream", headers=kept)
    made, gone = asyncio.create_task(run.whole()), asyncio.create_task(_gone(request))
    try:
        await asyncio.wait({made, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not made.done():
            return Response(status_code=499)  # nobody reads it; the gate lets the tickets go
        return JSONResponse(style.whole(made.result()))
    finally:
        made.cancel()
        gone.cancel()


async def _gone(request: Any) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class _Run:
    """The texts of one request under way."""

    def __init__(self, service: Service, asked: Asked, tickets: Sequence[Ticket], copies: int) -> None:
        self._service, self._asked, self._tickets = service, asked, tickets
        self._listener = Listener(tickets)
        self._texts = [Made(index, index // copies) for index in range(len(tickets))]
        self._last_s: list[float | None] = [None] * len(tickets)
        self._until_s = asked.arrived_s + service.limits.request_s

    async def whole(self) -> list[Made]:
        """All texts, once they have ended."""
        try:
            while any(made.end is None for made in self._texts):
                for heard in await self._more():
                    self._take(heard)
        finally:
            self._listener.close()
        return self._texts

    async def events(self, style: Style) -> AsyncIterator[bytes]:
        """What is streamed."""
        yield b"".join(style.opening())
        said = list[bytes]()  # and not sent yet
        try:
            while any(made.end is None for made in self._texts):
                for heard in await self._more():
                    made = self._take(heard)
                    said += style.piece(made, heard.event) if isinstance(heard.event, Token) else style.ended(made)
                now, said = said, []
                yield b"".join(now) if now else b": here\n\n"
            yield b"".join(style.closing(self._texts))
        except ApiError as error:  # what was heard before it is heard
            yield b"".join([*said, *style.failed(error)])
        finally:
            self._listener.close()

    async def _more(self) -> list[Heard]:
        left_s = self._until_s - time.perf_counter()
        if left_s <= 0:
            for ticket in self._tickets:
                ticket.cancel()
            message = (
                f"The answer took more than {self._service.limits.request_s:g} s. Nearest fix: ask for fewer tokens."
            )
            raise ApiError(message, 504, code="timeout")
        return await self._listener.more(min(_PULSE_S, left_s))

    def _take(self, heard: Heard) -> Made:
        made, now = self._texts[heard.index], heard.event
        arrived_s, meters = self._asked.arrived_s, self._service.meters
        if isinstance(now, Finished):
            made.end = now
            meters.ended(now, heard.at_s - arrived_s)
            if (error := trouble(now)) is not None:
                raise error
            return made
        made.tokens.append(now)
        before = self._last_s[heard.index]
        if before is None:
            meters.first(heard.at_s - arrived_s)
        else:
            meters.next(heard.at_s - before)
        self._last_s[heard.index] = heard.at_s
        return made
