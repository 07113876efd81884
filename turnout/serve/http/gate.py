"""Gate: what every request passes, and what is let go when it is over, however it ends."""

import asyncio
import json
import logging
import uuid
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from turnout.serve.http.errors import ApiError
from turnout.serve.http.limits import Door, Limits
from turnout.serve.http.metrics import Meters

__all__ = ["TICKETS", "Gate"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]
# Where a request keeps the tickets that the engine gave it.
TICKETS = "turnout.tickets"
_LOG = logging.getLogger("turnout.serve")


class Gate:
    """An ASGI middleware: names, keys, limits, and no ticket that outlives its request.

    Args:
        app: what is behind it.
        door: who may come in.
        limits: what they may take.
        meters: counts them.
        free: paths that need no key: the page and whether the server is well, which say nothing of anybody.
        always: paths that are answered while the server drains.

    Source: the ASGI specification, 3.0.
    """

    def __init__(
        self,
        app: App,
        *,
        door: Door,
        limits: Limits,
        meters: Meters,
        free: Collection[str],
        always: Collection[str],
    ) -> None:
        self._app, self._door, self._limits, self._meters = app, door, limits, meters
        self._free, self._always = frozenset(free), frozenset(always)

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request; ``lifespan`` goes through."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            return await self._app(scope, receive, send)
        scope[TICKETS] = []
        told = _Told(send, self._limits.reader_s, self._meters, scope)
        self._door.active += 1
        try:
            async with told.limit:
                self._check(scope)
                await self._app(scope, receive, told)
        except ApiError as error:
            await told.refuse(error)
        except TimeoutError:
            if not told.started:
                raise
            _LOG.info("a client read nothing for %s s: let go", self._limits.reader_s)
        finally:
            self._door.active -= 1
            for ticket in scope[TICKETS]:
                ticket.cancel()
            told.close()

    def _check(self, scope: Message) -> None:
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        host = headers.get(b"host", "")
        if not self._door.is_called(host):
            message = (
                f"This server does not answer to {host!r:.100}, only to names of this machine. Nearest fix: ask "
                f"http://127.0.0.1, or start it with --allowed-host NAME."
            )
            raise ApiError(message, 403, code="host_not_allowed")
        if path not in self._free and not self._door.knows(given := headers.get(b"authorization", "")):
            kind, _, key = given.partition(" ")
            message = "This server wants an API key. Nearest fix: send the header 'Authorization: Bearer KEY'."
            if kind.lower() == "bearer" and key.strip():
                message = (
                    "This server does not know this API key. Nearest fix: ask whoever runs it for one, or check it."
                )
            raise ApiError(message, 401, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if self._door.draining and path not in self._always:
            retry = {"Retry-After": "5", "Connection": "close"}
            raise ApiError("This server is ending. Nearest fix: ask another one.", 503, code="draining", headers=retry)
        if self._door.active > self._limits.active and path not in self._always:
            message = f"More than {self._limits.active} requests are under way. Nearest fix: come again later."
            raise ApiError(message, 429, code="too_many_requests", headers={"Retry-After": "1"})
        size = headers.get(b"content-length", "0")
        if size.isdecimal() and int(size) > self._limits.body_bytes:
            raise too_large(self._limits)


class _Told:
    """What is sent to a client, with a bound on how long it may leave that unread."""

    def __init__(self, send: Send, reader_s: float, meters: Meters, scope: Message) -> None:
        self._send, self._reader_s, self._meters, self._scope = send, reader_s, meters, scope
        self.started, self._status = False, 0
        self.limit = asyncio.timeout(None)
        self._loop = asyncio.get_running_loop()
        self._begun_s: float | None = None  # when what is being sent was begun
        self._timer: asyncio.TimerHandle | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started, self._status = True, message["status"]
            name = (b"x-request-id", uuid.uuid4().hex.encode())
            message["headers"] = [*message.get("headers", ()), name, (b"x-content-type-options", b"nosniff")]
        self._begun_s = self._loop.time()
        if self._timer is None:
            self._timer = self._loop.call_at(self._begun_s + self._reader_s, self._look)
        try:
            await self._send(message)
        finally:
            self._begun_s = None

    def _look(self) -> None:
        """Now and then, and not once for each token: whether what is being sent is not taken for too long."""
        self._timer = None
        if self._begun_s is None:
            return
        until_s = self._begun_s + self._reader_s
        if self._loop.time() >= until_s:
            self.limit.reschedule(until_s)
        else:
            self._timer = self._loop.call_at(until_s, self._look)

    async def refuse(self, error: ApiError) -> None:
        """Answers with an error, if nothing was answered yet."""
        if self.started:
            return
        body = json.dumps(error.body).encode()
        headers = [(name.lower().encode(), value.encode()) for name, value in error.headers.items()]
        headers += [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await self({"type": "http.response.start", "status": error.status, "headers": headers})
        await self({"type": "http.response.body", "body": body})

    def close(self) -> None:
        """Counts it."""
        if self._timer is not None:
            self._timer.cancel()
        route = getattr(self._scope.get("route"), "path", "")
        self._meters.answered(route, self._status)


async def read_body(receive: Receive, limits: Limits) -> bytes:
    """The body of a request.

    Raises:
        ApiError: it is too large, took too long, or its sender has gone.
    """
    parts, size = list[bytes](), 0
    try:
        async with asyncio.timeout(limits.body_s):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ApiError("The request ended before its body did.", 400, code="incomplete_body")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limits.body_bytes:
                    raise too_large(limits)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError as error:
        message = f"The body must arrive within {limits.body_s:g} s. Nearest fix: send it again."
        raise ApiError(message, 408, code="body_timeout", headers={"Connection": "close"}) from error


def too_large(limits: Limits) -> ApiError:
    """The refusal of a body that is too large."""
    message = f"The body must have at most {limits.body_bytes} bytes. Nearest fix: send less in one request."
    return ApiError(message, 413, code="body_too_large", headers={"Connection": "close"})
