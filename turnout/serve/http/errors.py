"""Refusals in OpenAI's format: one exception, its words, and what HTTP says of it."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from turnout.errors import TurnoutError, word

__all__ = ["ApiError", "error_body", "invalid", "unknown_model"]

# What OpenAI's clients look at, by status; all others are of the caller's making.
_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
_CALLER = "invalid_request_error"
_SERVER = "server_error"


@dataclasses.dataclass(eq=False)
class ApiError(TurnoutError):
    """What a request is answered with instead of what it asked for.

    Args:
        message: says what was passed, what is allowed, and the nearest fix.
        status: of HTTP.
        param: the field that is wrong, as the caller wrote it; None where it is none.
        code: a word for programs.
        headers: further ones of the response, ``Retry-After`` say.

    >>> ApiError("the queue is full", 429, code="queue_full").kind
    'rate_limit_error'

    Source: the error object of OpenAI's API.
    """

    message: str
    status: int = 400
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__(self.message)

    @property
    def kind(self) -> str:
        """OpenAI's word for the sort of error."""
        return _KINDS.get(self.status, _SERVER if self.status >= 500 else _CALLER)

    @property
    def body(self) -> dict[str, Any]:
        """What is sent."""
        return error_body(self.message, kind=self.kind, param=self.param, code=self.code)


def error_body(message: str, *, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it.

    >>> error_body("no", kind="server_error")
    {'error': {'message': 'no', 'type': 'server_error', 'param': None, 'code': None}}

    Source: the error object of OpenAI's API.
    """
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def invalid(param: str, *, got: object, allowed: str, where: str, fix: str, code: str = "invalid_value") -> ApiError:
    """The refusal of one field of a request.

    Args:
        param: the field: ``messages[0].role``.
        got: what was passed.
        allowed: as in ``turnout.errors.word``.
        where: the endpoint.
        fix: the nearest thing that would work.
        code: a word for programs.

    >>> print(invalid("n", got=0, allowed="be at least 1", where="/v1/completions", fix="pass 1"))
    n must be at least 1 in /v1/completions; got 0. Nearest fix: pass 1.

    Source: none; ``turnout.errors.word``.
    """
    shown = f"{got:.400}" if isinstance(got, str) else f"{got!r:.120}"
    return ApiError(word(param, got=shown, allowed=allowed, where=where, fix=fix), 400, param, code)


def unknown_model(name: str, names: Iterable[str]) -> ApiError:
    """The refusal of a model that is not served, with the nearest that is.

    >>> print(unknown_model("Mixtrl", ["mixtral"]))
    The model 'Mixtrl' does not exist here. Did you mean 'mixtral'? Served: mixtral.

    Source: none; difflib's closest match. It is offered, never taken.
    """
    known = list(names)
    cased = {one.lower(): one for one in known}
    close = [cased[one] for one in difflib.get_close_matches(name[:120].lower(), cased, n=1, cutoff=0.5)]
    hint = f" Did you mean {close[0]!r}?" if close else ""
    message = f"The model {name!r:.120} does not exist here.{hint} Served: {', '.join(known)}."
    return ApiError(message, 404, "model", "model_not_found")
