"""``/v1/chat/completions``: what the assistant says next, by the checkpoint's own chat template."""

import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from turnout import __version__
from turnout.serve.engine import Token
from turnout.serve.http.answer import Pieces, answer, event
from turnout.serve.http.errors import ApiError, invalid
from turnout.serve.http.made import Made, Usage, chat_logprobs
from turnout.serve.http.sampling import check_choices, fitting
from turnout.serve.http.schemas import CHAT
from turnout.serve.http.service import Asked, Service

__all__ = ["WHERE", "chat", "joined"]

WHERE = "/v1/chat/completions"


async def chat(service: Service, request: Any) -> Any:
    """Answers a request.

    Raises:
        ApiError: it cannot be.

    Source: OpenAI's API.
    """
    asked = await service.asked(request, CHAT, WHERE)
    body, copies = asked.body, asked.body.get("n") or 1
    check_choices(copies, service.limits.choices, WHERE)
    told = body.get("chat_template_kwargs")
    messages = joined(body["messages"])
    prompt = await service.aside(asked.size, lambda: service.texts.chat(messages, told, param="messages", where=WHERE))
    name = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    tokens = fitting(prompt, body.get(name), None, service.engine.max_seq, name)
    how: dict[str, Any] = {"logprobs": _logprobs(body), "form": body.get("response_format")}
    wanted = await service.wanted(asked, [prompt], tokens=[tokens], **how)
    return await answer(service, request, asked, wanted, _Style(service, asked), copies=copies)


def joined(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    r"""Messages whose contents are texts: the parts of one in lines, as vLLM joins them; null fields left out.

    >>> joined([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
    [{'role': 'user', 'content': 'a\nb'}]

    Source: none; vLLM's content format "string".
    """
    found = []
    for message in messages:
        content = message["content"]
        text = content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        kept = {name: message[name] for name in ("name", "reasoning_content") if message.get(name) is not None}
        found.append({"role": message["role"], "content": text, **kept})
    return found


def _logprobs(body: Mapping[str, Any]) -> int | None:
    top = body.get("top_logprobs")
    if not body.get("logprobs"):
        if top:
            allowed = "come with logprobs=true"
            raise invalid("top_logprobs", got=top, allowed=allowed, where=WHERE, fix="pass logprobs=true as well")
        return None
    return top or 0


class _Style:
    """The words of this endpoint."""

    def __init__(self, service: Service, asked: Asked) -> None:
        self._texts, self._made, self._logs = service.texts, int(time.time()), bool(asked.body.get("logprobs"))
        self._id, self._model = f"chatcmpl-{uuid.uuid4().hex}", asked.model
        options = asked.body.get("stream_options") or {}
        self._counts: dict[str, Any] = {"usage": None} if options.get("include_usage") else {}
        self._copies = asked.body.get("n") or 1
        self._chunk = self._head("chat.completion.chunk")
        self._pieces = Pieces(lambda index, text: self._body(index, {"content": text}))

    def opening(self) -> Iterable[bytes]:
        """Who speaks."""
        return [event(self._body(index, {"role": "assistant", "content": ""})) for index in range(self._copies)]

    def piece(self, made: Made, token: Token) -> Iterable[bytes]:
        """A token's text."""
        if not self._logs:
            return [self._pieces.event(made.index, token.text)] if token.text else []
        logs = self._logprobs([token])
        if not token.text and not (logs and logs["content"]):
            return []
        return [event(self._body(made.index, {"content": token.text}, logs))]

    def ended(self, made: Made) -> Iterable[bytes]:
        """Why."""
        return [event(self._body(made.index, {}, None, made.reason))]

    def closing(self, texts: Sequence[Made]) -> Iterable[bytes]:
        """What it took."""
        usage = [event({**self._chunk, "choices": [], "usage": Usage.of(texts).completion()})] if self._counts else []
        return [*usage, b"data: [DONE]\n\n"]

    def failed(self, error: ApiError) -> Iterable[bytes]:
        """What went wrong."""
        return [event(error.body), b"data: [DONE]\n\n"]

    def whole(self, texts: Sequence[Made]) -> dict[str, Any]:
        """All messages."""
        choices = [
            {
                "index": made.index,
                "message": {"role": "assistant", "content": made.text, "refusal": None},
                "logprobs": self._logprobs(made.tokens),
                "finish_reason": made.reason,
            }
            for made in texts
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": Usage.of(texts).completion()}

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self._id, "object": kind, "created": self._made, "model": self._model}
        return {**head, "system_fingerprint": f"turnout-{__version__}"}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._logs:
            return None
        return {"content": chat_logprobs(tokens, self._texts.spelling), "refusal": None}

    def _body(
        self,
        index: int,
        delta: Mapping[str, Any],
        logprobs: Mapping[str, Any] | None = None,
        reason: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return {**self._chunk, "choices": [choice], **self._counts}
