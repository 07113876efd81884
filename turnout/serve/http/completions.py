"""``/v1/completions``: texts that go on from prompts, as OpenAI's first API has it."""

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from turnout import __version__
from turnout.serve.engine import Token
from turnout.serve.http.answer import Pieces, answer, event
from turnout.serve.http.errors import ApiError, invalid
from turnout.serve.http.made import Made, Usage, completion_logprobs
from turnout.serve.http.sampling import check_choices, fitting
from turnout.serve.http.schemas import COMPLETIONS
from turnout.serve.http.service import Asked, Service

__all__ = ["WHERE", "completions"]

WHERE = "/v1/completions"
_TOKENS = 16  # OpenAI's own default


async def completions(service: Service, request: Any) -> Any:
    """Answers a request.

    Raises:
        ApiError: it cannot be.

    Source: OpenAI's API.
    """
    asked = await service.asked(request, COMPLETIONS, WHERE)
    body = asked.body
    copies, echo = body.get("n") or 1, bool(body.get("echo"))
    if echo and body.get("logprobs") is not None:
        allowed, fix = "be left out with logprobs, which prompts have none of here,", "leave echo or logprobs out"
        raise invalid("echo", got=True, allowed=allowed, where=WHERE, fix=fix, code="unsupported_parameter")
    prompts = await service.aside(asked.size, lambda: _prompts(service, body["prompt"]))
    check_choices(len(prompts) * copies, service.limits.choices, WHERE)
    room = service.engine.max_seq
    tokens = [fitting(one, body.get("max_tokens"), _TOKENS, room, "max_tokens") for one in prompts]
    how: dict[str, Any] = {"logprobs": body.get("logprobs"), "form": body.get("response_format")}
    wanted = await service.wanted(asked, prompts, tokens=tokens, **how)
    starts = [_said(service, body["prompt"], prompts, place) if echo else "" for place in range(len(prompts))]
    return await answer(service, request, asked, wanted, _Style(service, asked, starts), copies=copies)


def _prompts(service: Service, given: Any) -> list[tuple[int, ...]]:
    """The tokens of each prompt: a text, texts, tokens, or lists of tokens."""
    if isinstance(given, str):
        return [service.texts.prompt(given, param="prompt", where=WHERE)]
    if isinstance(given[0], int):
        return [service.texts.known(given, param="prompt", where=WHERE)]
    found = []
    for place, one in enumerate(given):
        param = f"prompt[{place}]"
        found.append(
            service.texts.prompt(one, param=param, where=WHERE)
            if isinstance(one, str)
            else service.texts.known(one, param=param, where=WHERE)
        )
    return found


def _said(service: Service, given: Any, prompts: Sequence[tuple[int, ...]], place: int) -> str:
    """A prompt as text."""
    if isinstance(given, str):
        return given
    if isinstance(given[place], str):
        return given[place]
    return service.texts.tokenizer.decode(list(prompts[place]), skip_special_tokens=False)


class _Style:
    """The words of this endpoint."""

    def __init__(self, service: Service, asked: Asked, starts: Sequence[str]) -> None:
        self._texts, self._starts, self._body = service.texts, starts, asked.body
        self._head = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked.model,
            "system_fingerprint": f"turnout-{__version__}",
        }
        options = asked.body.get("stream_options") or {}
        self._counts: dict[str, Any] = {"usage": None} if options.get("include_usage") else {}
        self._logs = asked.body.get("logprobs") is not None
        self._routes = bool(asked.body.get("routes"))
        self._sent: dict[int, int] = {}
        self._pieces = Pieces(lambda index, text: self._body_of(_choice(index, text, None, None)))

    def opening(self) -> Iterable[bytes]:
        """The prompts, where they are wanted back."""
        each = (self._body.get("n") or 1) if any(self._starts) else 0
        return [self._event(at, start) for at, start in enumerate(one for one in self._starts for _ in range(each))]

    def piece(self, made: Made, token: Token) -> Iterable[bytes]:
        """A token's text."""
        if not (self._logs or self._routes):
            return [self._pieces.event(made.index, token.text)] if token.text else []
        offset = self._sent.get(made.index, 0)
        self._sent[made.index] = offset + len(token.text)
        logs = self._logprobs([token], offset)
        shown = token.text or self._routes or (logs and logs["tokens"])
        return [self._event(made.index, token.text, logs, routes=token.routes)] if shown else []

    def ended(self, made: Made) -> Iterable[bytes]:
        """Why."""
        return [self._event(made.index, "", None, made.reason)]

    def closing(self, texts: Sequence[Made]) -> Iterable[bytes]:
        """What it took."""
        usage = [event({**self._head, "choices": [], "usage": Usage.of(texts).completion()})] if self._counts else []
        return [*usage, b"data: [DONE]\n\n"]

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """What went wrong."""
        return [event(error.body), b"data: [DONE]\n\n"]

    def whole(self, texts: Sequence[Made]) -> dict[str, Any]:
        """All texts."""
        choices = [
            _choice(made.index, self._starts[made.prompt] + made.text, self._logprobs(made.tokens, 0), made.reason)
            | ({"routes": [token.routes for token in made.tokens]} if self._routes else {})
            for made in texts
        ]
        return {**self._head, "choices": choices, "usage": Usage.of(texts).completion()}

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        return completion_logprobs(tokens, self._texts.spelling, offset) if self._logs else None

    def _event(
        self,
        index: int,
        text: str,
        logprobs: Mapping[str, Any] | None = None,
        reason: str | None = None,
        routes: Sequence[Sequence[int]] | None = None,
    ) -> bytes:
        further = {"routes": routes} if self._routes and reason is None else {}
        return event(self._body_of(_choice(index, text, logprobs, reason) | further))

    def _body_of(self, choice: Mapping[str, Any]) -> dict[str, Any]:
        return {**self._head, "choices": [choice], **self._counts}


def _choice(index: int, text: str, logprobs: Mapping[str, Any] | None, reason: str | None) -> dict[str, Any]:
    return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}
