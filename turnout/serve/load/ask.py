"""One streamed request: the events of its answer, read as they come."""

import asyncio
import json
from typing import Any

from turnout.serve.load.answer import Answer
from turnout.serve.load.exchange import Exchange, Target

__all__ = ["ask", "fetch"]


async def ask(
    target: Target,
    request: bytes,
    *,
    asked_tokens: int,
    due_s: float | None = None,
    timeout_s: float = 600.0,
    fixed: bool = False,
    leave_after: int | None = None,
    pause_s: float = 0.0,
) -> Answer:
    """Sends a request that streams, and gives what came of it; a failure is an answer with its kind, never an error.

    Args:
        target: where to.
        request: its bytes, of ``Target.request``.
        asked_tokens: the most that it may answer.
        due_s: when it should be sent, by the event loop's clock; default now. Sending does not wait for it.
        timeout_s: the longest that it may take, from when it is sent.
        fixed: whether an answer of fewer tokens is a failure.
        leave_after: closes the connection after so many pieces, as users do; the answer's kind is then ``left``.
        pause_s: how long it stops reading after each piece, as a slow network does.

    Returns:
        The answer, judged.

    >>> nobody = Target("http://127.0.0.1:1")
    >>> asyncio.run(ask(nobody, nobody.request("completions", b"{}"), asked_tokens=1)).error
    'no connection'

    Source: the protocol of OpenAI's API, streaming by server-sent events.
    """
    loop = asyncio.get_running_loop()
    reader = _Reader(leave_after)
    host, port, context = target.place
    sent_s = loop.time()
    due_s = sent_s if due_s is None else due_s
    try:
        async with asyncio.timeout(timeout_s):
            _, exchange = await loop.create_connection(
                lambda: Exchange(request, reader.take, loop.time, loop.create_future()), host, port, ssl=context
            )
            reader.exchange = exchange
            if pause_s:
                reader.slow = lambda: _pause(loop, exchange, pause_s)
            try:
                await exchange.ended
            finally:
                exchange.stop()
        reader.finish()
    except TimeoutError:
        reader.fail("timeout", f"no end within {timeout_s:g} s")
    except OSError as error:
        kind = "cut" if reader.exchange is not None and reader.exchange.status else "no connection"
        reader.fail(kind, f"{type(error).__name__}: {error}")
    return reader.answer(due_s=due_s, sent_s=sent_s, ended_s=loop.time(), asked_tokens=asked_tokens).judged(fixed=fixed)


async def fetch(target: Target, request: bytes, *, timeout_s: float = 60.0) -> tuple[int, bytes]:
    """The status and the whole body of an answer that does not stream.

    Args:
        target: where to.
        request: its bytes, of ``Target.request``.
        timeout_s: the longest that it may take.

    Raises:
        OSError: there is no answer; ``TimeoutError``, none in time.
    """
    loop, parts = asyncio.get_running_loop(), list[bytes]()
    host, port, context = target.place
    async with asyncio.timeout(timeout_s):
        _, exchange = await loop.create_connection(
            lambda: Exchange(request, lambda data, _: parts.append(data), loop.time, loop.create_future()),
            host, port, ssl=context,
        )  # fmt: skip
        try:
            await exchange.ended
        finally:
            exchange.stop()
    return exchange.status, b"".join(parts)


def _pause(loop: asyncio.AbstractEventLoop, exchange: Exchange, pause_s: float) -> None:
    transport = exchange.transport
    if transport is not None and not transport.is_closing():
        transport.pause_reading()
        loop.call_later(pause_s, lambda: None if transport.is_closing() else transport.resume_reading())


class _Reader:
    """Takes bytes as they come, and keeps what an ``Answer`` needs."""

    def __init__(self, leave_after: int | None) -> None:
        self.exchange: Exchange | None = None
        self.slow: Any = None
        self._leave_after = leave_after
        self._held, self._done = b"", False
        self._at: list[float] = []
        self._pieces: list[str] = []
        self._finish = self._error = self._message = ""
        self._usage: dict[str, Any] = {}

    def take(self, data: bytes, now: float) -> None:
        """Some of the body."""
        self._held += data
        assert self.exchange is not None
        if self.exchange.status != 200:
            return
        if b"\r" in data:
            self._held = self._held.replace(b"\r\n", b"\n")
        *events, self._held = self._held.split(b"\n\n")
        for event in events:
            if not self._error:
                self._event(event, now)
        if self._leave_after is not None and len(self._at) >= self._leave_after and not self._error:
            self.fail("left", f"closed after {len(self._at)} pieces")
            self.exchange.stop()
        elif events and self.slow is not None:
            self.slow()

    def _event(self, event: bytes, now: float) -> None:
        said = b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:"))
        if not said:
            return  # a comment that keeps the connection alive
        if said == b"[DONE]":
            self._done = True
            return
        try:
            chunk = json.loads(said)
            if chunk.get("error"):
                self.fail("error event", _said(chunk["error"]))
                return
            self._usage = chunk.get("usage") or self._usage
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                text = choice.get("text") or delta.get("content") or ""
                text = text or delta.get("reasoning_content") or delta.get("reasoning") or ""
                if text:
                    self._at.append(now)
                    self._pieces.append(text)
                self._finish = choice.get("finish_reason") or self._finish
        except (ValueError, AttributeError, TypeError) as error:
            self.fail("no event", f"{type(error).__name__}: {error}: {said[:200].decode(errors='replace')}")

    def finish(self) -> None:
        """All of the answer is there."""
        assert self.exchange is not None
        if self._error:
            return
        if self.exchange.status != 200:
            try:
                said = _said(json.loads(self._held)["error"])
            except (ValueError, KeyError, TypeError):
                said = f"no error of OpenAI's form: {self._held[:200].decode(errors='replace')}"
            self.fail(f"HTTP {self.exchange.status}", said)
        elif "text/event-stream" not in self.exchange.headers.get("content-type", ""):
            self.fail("no stream", f"it answers with {self.exchange.headers.get('content-type', 'no type')}")

    def fail(self, kind: str, message: str) -> None:
        """It is none: the first reason stands."""
        if not self._error:
            self._error, self._message = kind, message

    def answer(self, *, due_s: float, sent_s: float, ended_s: float, asked_tokens: int) -> Answer:
        """What was read."""
        usage = self._usage if isinstance(self._usage, dict) else {}
        details = usage.get("prompt_tokens_details")
        wait = self.exchange.headers.get("retry-after", "") if self.exchange is not None else ""
        return Answer(
            due_s=due_s,
            sent_s=sent_s,
            ended_s=ended_s,
            asked_tokens=asked_tokens,
            piece_s=tuple(self._at),
            text="".join(self._pieces),
            finish=self._finish,
            prompt_tokens=_count(usage.get("prompt_tokens")),
            output_tokens=_count(usage.get("completion_tokens")),
            cached_tokens=_count(details.get("cached_tokens")) if isinstance(details, dict) else None,
            error=self._error,
            message=self._message,
            retry_after=float(wait) if wait.isdigit() else None,
        )


def _count(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def _said(error: object) -> str:
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:300]
