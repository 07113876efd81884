"""Server: an application at a port, until it is told to end, and then in peace."""

import asyncio
import errno
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from turnout.errors import MissingExtraError, UsageError, word
from turnout.serve.http.service import Service

__all__ = ["listen", "run_server"]

_WHERE = "turnout serve"
# What those whose answers are cut short at the end have to hear of it.
_TELLING_S = 5.0


def listen(host: str, port: int, *, reader_s: float = 60.0) -> socket.socket:
    """A socket at which a server may listen.

    Args:
        host: a name or an address.
        port: 0 for any that is free.
        reader_s: for which the system keeps what a client does not take; then it lets the connection go, where it can.

    Raises:
        UsageError: another program is there, or the address is none of this machine's.

    >>> with listen("127.0.0.1", 0) as found:
    ...     found.getsockname()[0]
    '127.0.0.1'

    Source: RFC 5482 for the bound.
    """
    if not 0 <= port <= 65535:
        raise _refusal("--port", port, "be a whole number from 0 to 65535", "pass --port 8000")
    made: socket.socket | None = None
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
            0
        ]
        made = socket.socket(family, kind)
        if os.name == "posix":  # elsewhere it would let two servers share a port
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):  # taken over by every connection
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * reader_s))
        made.bind(address)
        made.listen(2048)
        return made
    except OSError as error:
        if made is not None:
            made.close()
        if error.errno == errno.EADDRINUSE:
            fix = f"pass --port {port + 1 if port < 65535 else 8000}, or end what is there"
            raise _refusal("--port", f"{port}, where another program listens", "be free", fix) from error
        if error.errno == errno.EACCES:
            got, fix = f"{port}, which this user may not take", "pass --port 8000"
            raise _refusal("--port", got, "be one that this user may take", fix) from error
        got, fix = f"{host} ({error.strerror or error})", "pass --host 127.0.0.1"
        raise _refusal("--host", got, "be an address of this machine", fix) from error


def run_server(app: Any, sock: socket.socket, *, ready: Callable[[str], object] = lambda url: None) -> None:
    """Serves until SIGTERM or Ctrl-C: then nothing new is taken, and what is under way is finished, within a limit.

    A second signal ends it at once. The engine is closed either way.

    Args:
        app: of ``build_app``.
        sock: of ``listen``.
        ready: called with the server's address once it answers.

    Raises:
        MissingExtraError: uvicorn is not installed.

    >>> run_server(build_app(engine, texts), listen("127.0.0.1", 8000))  # doctest: +SKIP

    Source: none; uvicorn.
    """
    service: Service = app.state.service
    try:
        asyncio.run(_server(app, service, lambda: ready(address_of(sock))).serve(sockets=[sock]))
    finally:
        service.engine.close()
        sock.close()


def _server(app: Any, service: Service, ready: Callable[[], object]) -> Any:
    """A server of uvicorn that finishes what it began before it stops listening: whoever asks meanwhile is told."""
    try:
        import uvicorn
    except ImportError as error:
        raise MissingExtraError("turnout serve needs uvicorn. Nearest fix: pip install 'turnout[serve]'.") from error

    class Server(uvicorn.Server):
        """The first signal begins the end, the second is it."""

        draining_s: float | None = None
        cut = False

        def handle_exit(self, sig: int, frame: Any) -> None:
            """A signal came."""
            if service.door.draining:
                self.force_exit = self.should_exit = True
            service.door.draining = True

        async def on_tick(self, counter: int) -> bool:
            """Ten times a second: whether it is over."""
            if service.door.draining:
                self.draining_s = self.draining_s or time.monotonic()
                over_s = time.monotonic() - self.draining_s - service.limits.drain_s
                if over_s > 0 and not self.cut:
                    self.cut = True  # whoever still waits is told so, in a moment
                    asyncio.get_running_loop().run_in_executor(None, service.engine.close)
                self.should_exit |= over_s > _TELLING_S or service.door.active == 0
            return await super().on_tick(counter)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Says that it answers."""
            await super().startup(sockets)
            ready()

    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        server_header=False,
        ws="none",
    )
    return Server(config)


def address_of(sock: socket.socket) -> str:
    """The address at which a client finds it: where it listens everywhere, that of this machine."""
    host, port = sock.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _refusal(what: str, got: object, allowed: str, fix: str) -> UsageError:
    return UsageError(word(what, got=got, allowed=allowed, where=_WHERE, fix=fix))
