"""One HTTP/1.1 request and its answer on a connection of its own, as little work as Python can make of it.

A client that shares two cores with what it measures must cost nothing: no headers are kept that nobody reads, the body
is handed on as it arrives, and the clock is read once for what arrives together.
"""

import asyncio
import dataclasses
import ssl
from collections.abc import Callable
from urllib.parse import urlsplit

from turnout import __version__
from turnout.errors import UsageError, word

__all__ = ["Exchange", "Target"]

_PORTS = {"http": 80, "https": 443}


@dataclasses.dataclass(frozen=True)
class Target:
    """A server that speaks OpenAI's protocol.

    Args:
        url: its address, with or without ``/v1``.
        key: what it wants as a bearer token; empty for none.

    Raises:
        UsageError: no address of http or https.

    >>> Target("http://127.0.0.1:8000").path("completions")
    '/v1/completions'

    Source: RFC 9112 (HTTP/1.1).
    """

    url: str
    key: str = dataclasses.field(default="", repr=False)

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        try:
            fits = parts.scheme in _PORTS and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:  # of a port
            fits = False
        if not fits or parts.query or parts.fragment or not self.url.isascii():
            allowed, fix = "be an address of http or https", "write http://127.0.0.1:8000"
            raise UsageError(word("URL", got=self.url, allowed=allowed, where="turnout bench-serve", fix=fix))
        if not (self.key.isascii() and self.key.isprintable()):
            allowed, fix = "be one line of ASCII", "look at what the variable holds"
            raise UsageError(word("the key", got="another", allowed=allowed, where="turnout bench-serve", fix=fix))

    @property
    def place(self) -> tuple[str, int, ssl.SSLContext | None]:
        """Host, port, and what TLS needs where it is spoken."""
        parts = urlsplit(self.url)
        context = ssl.create_default_context() if parts.scheme == "https" else None
        return str(parts.hostname), parts.port or _PORTS[parts.scheme], context

    def path(self, name: str) -> str:
        """Of an endpoint: ``completions``, ``chat/completions``, ``models``.

        Args:
            name: what stands behind ``/v1/``.
        """
        before = urlsplit(self.url).path.rstrip("/")
        return f"{before if before.endswith('/v1') else before + '/v1'}/{name}"

    def request(self, name: str, body: bytes | None = None) -> bytes:
        """The bytes of a request, made before the clock runs.

        Args:
            name: what stands behind ``/v1/``.
            body: JSON that is posted; None gets.
        """
        parts = urlsplit(self.url)
        lines = [f"{'GET' if body is None else 'POST'} {self.path(name)} HTTP/1.1", f"Host: {parts.netloc}"]
        lines += ["Connection: close", f"User-Agent: turnout/{__version__}"]
        lines += [f"Authorization: Bearer {self.key}"] if self.key else []
        if body is not None:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
        return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


class Exchange(asyncio.Protocol):
    """Sends a request, and hands on the body of its answer.

    Args:
        request: all of its bytes.
        sink: is given what arrives of the body, and when.
        clock: seconds.
        ended: is told when it is over, with an error where it is not whole.

    Source: RFC 9112 (HTTP/1.1); where we differ: one exchange a connection, no trailers, no compression.
    """

    def __init__(
        self,
        request: bytes,
        sink: Callable[[bytes, float], None],
        clock: Callable[[], float],
        ended: "asyncio.Future[None]",
    ) -> None:
        self.status, self.headers = 0, dict[str, str]()
        self.ended = ended
        self.transport: asyncio.Transport | None = None
        self._request, self._sink, self._clock = request, sink, clock
        self._held, self._chunked, self._left = b"", False, -1  # -1: until the connection ends

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Sends it."""
        self.transport = transport  # type: ignore[assignment]
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        """Takes the head off, and hands on the body."""
        now = self._clock()
        try:
            if not self.status:
                data = self._head(data)
            elif self._chunked:
                data = self._chunks(data)
            elif self._left >= 0:
                self._left -= len(data)
        except (ValueError, IndexError, ConnectionError) as error:
            self._end(ConnectionError(f"it does not answer in HTTP/1.1 ({error})"))
            return
        if data and not self.ended.done():
            self._sink(data, now)
        if self.status and self._left == 0:
            self._end(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """An answer without a length is whole then; any other was cut."""
        whole = exc is None and self.status and not self._chunked and self._left <= 0
        self._end(None if whole else exc or ConnectionResetError("it closed the connection before the answer's end"))

    def stop(self) -> None:
        """Leaves, as a client that has heard enough does."""
        self._end(None)

    def _head(self, data: bytes) -> bytes:
        head, end, rest = (self._held + data).partition(b"\r\n\r\n")
        if not end:
            self._held = head
            return b""
        first, *lines = head.decode("latin-1").split("\r\n")
        status = int(first.split(" ")[1])
        if not first.startswith("HTTP/1.") or not 100 <= status < 600:
            raise ConnectionError(first[:80])
        if status < 200:  # to be continued
            self._held = b""
            return self._head(rest)
        self.status, self._held = status, b""
        self.headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)
        }
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            self._chunked = True
            return self._chunks(rest)
        if "content-length" in self.headers:
            self._left = int(self.headers["content-length"]) - len(rest)
        return rest

    def _chunks(self, data: bytes) -> bytes:
        held, at, found = self._held + data if self._held else data, 0, []
        while (end := held.find(b"\r\n", at)) >= 0:
            size = int(held[at:end].split(b";")[0], 16)
            if size == 0:
                self._left = 0
                break
            stop = end + 2 + size
            if len(held) < stop + 2:
                break
            found.append(held[end + 2 : stop])
            at = stop + 2
        self._held = held[at:]
        return found[0] if len(found) == 1 else b"".join(found)

    def _end(self, error: Exception | None) -> None:
        if not self.ended.done():
            if error is None:
                self.ended.set_result(None)
            else:
                self.ended.set_exception(error)
        if self.transport is not None:
            self.transport.abort() if self._left != 0 else self.transport.close()
