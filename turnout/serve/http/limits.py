"""What one request may take of a server, and who may ask."""

import dataclasses
import hmac
from collections.abc import Sequence

from turnout.errors import UsageError, word

__all__ = ["Door", "Limits"]

_LOCAL = ("localhost", "127.0.0.1", "::1")
_WHERE = "turnout serve"


@dataclasses.dataclass(frozen=True)
class Limits:
    """The most that a request may take.

    Args:
        body_bytes: of a request.
        body_s: in which it must have arrived.
        choices: texts of one request, all its prompts together.
        request_s: from its arrival to its end.
        reader_s: for which a client may leave what is sent to it unread.
        active: requests that are being read, waiting or answered, all together.
        drain_s: which requests under way are given when the server is told to end.

    Raises:
        UsageError: one of them is not above 0.

    >>> Limits(choices=4).choices
    4

    Source: none; plain bookkeeping.
    """

    body_bytes: int = 8 << 20
    body_s: float = 30.0
    choices: int = 128
    request_s: float = 1800.0
    reader_s: float = 60.0
    active: int = 1024
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not 0 < value < float("inf"):
                fix = f"pass {field.name}={field.default}"
                raise UsageError(word(field.name, got=value, allowed="be above 0", where=f"{_WHERE}: Limits", fix=fix))


class Door:
    """Who may come in: by key, by the name that they call the server, and whether it takes anybody still.

    Args:
        keys: the API keys; with none everybody may come.
        hosts: the names in a request's ``Host``; None for any. A page in a browser on this machine can
            otherwise have its own name lead here, and read the answers (DNS rebinding).

    >>> door = Door(keys=["secret"], hosts=["localhost"])
    >>> door.knows("Bearer secret"), door.knows("Bearer secre"), door.is_called("localhost:80"), door.is_called("evil")
    (True, False, True, False)

    Source: none; ``hmac.compare_digest``.
    """

    def __init__(self, *, keys: Sequence[str] = (), hosts: Sequence[str] | None = None) -> None:
        self._keys = [key.encode() for key in keys]
        self._hosts = None if hosts is None else {host.lower().strip("[]") for host in hosts}
        self.draining, self.active = False, 0

    @classmethod
    def at(cls, host: str, *, keys: Sequence[str] = (), also: Sequence[str] = ()) -> "Door":
        """That of a server which listens at ``host``: on this machine alone it answers to its own names and ``also``.

        >>> Door.at("127.0.0.1").is_called("evil.example"), Door.at("0.0.0.0").is_called("any.example")
        (False, True)
        """
        if not is_local(host) and not also:
            return cls(keys=keys)
        return cls(keys=keys, hosts=[*_LOCAL, host, *also])

    def knows(self, authorization: str) -> bool:
        """Whether a header ``Authorization`` has one of the keys; all are compared, each in constant time."""
        if not self._keys:
            return True
        kind, _, given = authorization.partition(" ")
        token = given.strip().encode(errors="replace") if kind.lower() == "bearer" else b""
        return True in [hmac.compare_digest(token, key) for key in self._keys]

    def tenant(self, authorization: str) -> str:
        """Whose requests take turns with others': which of the keys it is; one for all without keys."""
        token = authorization.partition(" ")[2].strip().encode(errors="replace")
        found = [hmac.compare_digest(token, key) for key in self._keys]
        return f"key {found.index(True)}" if True in found else ""

    def is_called(self, host: str) -> bool:
        """Whether a header ``Host`` has one of this server's names."""
        return self._hosts is None or host_name(host) in self._hosts


def host_name(host: str) -> str:
    """The name in a header ``Host``, without its port.

    >>> host_name("LocalHost:8000"), host_name("[::1]:8000")
    ('localhost', '::1')

    Source: RFC 9110, section 7.2.
    """
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def is_local(host: str) -> bool:
    """Whether nobody but this machine reaches a server there.

    >>> is_local("localhost"), is_local("127.0.0.2"), is_local("0.0.0.0")
    (True, True, False)

    Source: RFC 5735, section 3.
    """
    return host in _LOCAL or host.startswith("127.")
