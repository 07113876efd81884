"""``/v1/responses`` as far as it is text: an answer with its events, of which nothing is kept afterwards."""

import itertools
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from turnout.serve.engine import Token
from turnout.serve.http.answer import answer, event
from turnout.serve.http.chat import joined
from turnout.serve.http.errors import ApiError, invalid
from turnout.serve.http.made import Made, Usage, chat_logprobs
from turnout.serve.http.sampling import fitting
from turnout.serve.http.schemas import RESPONSES
from turnout.serve.http.service import Asked, Service

__all__ = ["WHERE", "responses"]

WHERE = "/v1/responses"
_LOGPROBS = "message.output_text.logprobs"


async def responses(service: Service, request: Any) -> Any:
    """Answers a request.

    Raises:
        ApiError: it cannot be.

    Source: OpenAI's API.
    """
    asked = await service.asked(request, RESPONSES, WHERE)
    body = asked.body
    told = body.get("chat_template_kwargs")
    messages = _messages(body)
    prompt = await service.aside(asked.size, lambda: service.texts.chat(messages, told, param="input", where=WHERE))
    tokens = fitting(prompt, body.get("max_output_tokens"), None, service.engine.max_seq, "max_output_tokens")
    form = (body.get("text") or {}).get("format")
    how: dict[str, Any] = {"logprobs": _logprobs(body), "form": form, "form_param": "text.format"}
    wanted = await service.wanted(asked, [prompt], tokens=[tokens], **how)
    return await answer(service, request, asked, wanted, _Style(service, asked))


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The conversation: instructions before all that was said."""
    given, first = body["input"], body.get("instructions")
    said = [{"role": "user", "content": given}] if isinstance(given, str) else joined(given)
    return [{"role": "system", "content": first}, *said] if first else said


def _logprobs(body: Mapping[str, Any]) -> int | None:
    if _LOGPROBS in (body.get("include") or ()):
        return body.get("top_logprobs") or 0
    if body.get("top_logprobs"):
        got, allowed = body["top_logprobs"], f"come with include=['{_LOGPROBS}']"
        raise invalid("top_logprobs", got=got, allowed=allowed, where=WHERE, fix="pass that as well")
    return None


class _Style:
    """The words of this endpoint."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._texts, self._body, self._model = service.texts, asked.body, asked.model
        self._id, self._item = f"resp_{uuid.uuid4().hex}", f"msg_{uuid.uuid4().hex}"
        self._created, self._numbers = int(time.time()), itertools.count()
        self._logs = _LOGPROBS in (asked.body.get("include") or ())

    def opening(self) -> Iterable[bytes]:
        """What was asked, and that a message begins."""
        begun = self._whole("in_progress", [], None)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._message("in_progress", []))
        yield self._event("response.content_part.added", **self._at(), part=self._part("", []))

    def piece(self, made: Made, token: Token) -> Iterable[bytes]:
        """A token's text."""
        logs = self._logprobs([token])
        if token.text or logs:
            yield self._event("response.output_text.delta", **self._at(), delta=token.text, logprobs=logs)

    def ended(self, made: Made) -> Iterable[bytes]:
        """The message, once more as a whole."""
        logs, text = self._logprobs(made.tokens), made.text
        part = self._part(text, logs)
        yield self._event("response.output_text.done", **self._at(), text=text, logprobs=logs)
        yield self._event("response.content_part.done", **self._at(), part=part)
        item = self._message(_status(made), [part])
        yield self._event("response.output_item.done", output_index=0, item=item)

    def closing(self, texts: Sequence[Made]) -> Iterable[bytes]:
        """The response, as it is without a stream."""
        whole = self.whole(texts)
        yield self._event(f"response.{whole['status']}", response=whole)

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """What went wrong."""
        whole = self._whole("failed", [], None)
        code = "server_error" if error.status >= 500 else error.code
        yield self._event("response.failed", response={**whole, "error": {"code": code, "message": error.message}})

    def whole(self, texts: Sequence[Made]) -> dict[str, Any]:
        """The response."""
        made = texts[0]
        status = _status(made)
        item = self._message(status, [self._part(made.text, self._logprobs(made.tokens))])
        return self._whole(status, [item], Usage.of(texts).response())

    def _event(self, kind: str, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, kind)

    def _at(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _logprobs(self, tokens: Sequence[Token]) -> list[dict[str, Any]]:
        return chat_logprobs(tokens, self._texts.spelling) if self._logs else []

    def _part(self, text: str, logprobs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _message(self, status: str, content: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": content}

    def _whole(
        self, status: str, output: Sequence[Mapping[str, Any]], usage: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "model": self._model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": None,
            "store": False,
            "temperature": 1.0 if body.get("temperature") is None else body["temperature"],
            "text": {"format": (body.get("text") or {}).get("format") or {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.get("top_logprobs") or 0,
            "top_p": 1.0 if body.get("top_p") is None else body["top_p"],
            "truncation": "disabled",
            "usage": usage,
            "user": body.get("user"),
            "metadata": body.get("metadata") or {},
        }


def _status(made: Made) -> str:
    return "incomplete" if made.reason == "length" else "completed"
