"""A server of OpenAI's streaming protocol that does what a test tells it: answers, stalls, breaks off, lies."""

import asyncio
import dataclasses
import json
import threading
import time
from collections.abc import Iterator

import pytest


@dataclasses.dataclass
class Endpoint:
    """How it behaves, and what it saw; a token is a word, and each takes ``step_s``."""

    url: str = ""
    step_s: float = 0.0
    first_s: float = 0.0
    manner: str = "whole"
    prompt_overhead: int = 3
    tokens_a_word: int = 2
    usage: bool = True
    most_words: int = 10_000
    bodies: list[dict] = dataclasses.field(default_factory=list)
    came_s: list[float] = dataclasses.field(default_factory=list)
    sent: list[int] = dataclasses.field(default_factory=list)
    left: int = 0
    blocked_until_s: float = 0.0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                (int(x.split(b":")[1]) for x in head.split(b"\r\n") if x.lower().startswith(b"content-length")), 0
            )
            body = await reader.readexactly(length)
            if head.startswith(b"GET"):
                self.reply(writer, 200, {"data": [{"id": "small"}]})
            else:
                self.came_s.append(time.monotonic())
                self.bodies.append(json.loads(body))
                await self.answer(writer, self.bodies[-1], chat=b"/chat/" in head.split(b"\r\n")[0])
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            self.left += 1
        finally:
            writer.close()

    def reply(self, writer: asyncio.StreamWriter, status: int, said: dict, *more: str) -> None:
        body = json.dumps(said).encode()
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(body)}", *more]
        writer.write("\r\n".join([*lines, "", ""]).encode() + body)

    async def answer(self, writer: asyncio.StreamWriter, body: dict, *, chat: bool) -> None:
        tokens = body["max_tokens"]
        if not chat and len(body["prompt"].split()) > self.most_words:
            self.reply(writer, 400, {"error": {"message": "too long"}})
            return
        if self.manner == "busy" and tokens > 1:
            self.reply(writer, 429, {"error": {"message": "too many", "code": "rate_limit"}}, "Retry-After: 3")
            return
        if self.manner == "broken" and tokens > 1:
            self.reply(writer, 500, {"detail": "oh"})
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        if chat:
            self.event(writer, {"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        await writer.drain()
        while (wait := self.blocked_until_s - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        await asyncio.sleep(self.first_s)
        given = max(1, tokens // 2) if self.manner in ("short", "cut", "closed", "error", "ended") else tokens
        for number in range(given):
            text = f" w{number}"
            self.event(writer, {"choices": [{"delta": {"content": text}} if chat else {"text": text}]})
            await writer.drain()
            await asyncio.sleep(self.step_s)
        self.sent.append(given)
        if self.manner == "cut":
            return  # without an end of the body
        if self.manner == "error":
            self.event(writer, {"error": "the model fell over"})
        elif self.manner != "closed":
            why = "stop" if self.manner == "ended" else "length"
            self.event(writer, {"choices": [{"finish_reason": why} | ({"delta": {}} if chat else {"text": ""})]})
        if self.usage and self.manner != "closed":
            prompt = body["messages"][0]["content"] if chat else body["prompt"]
            count = self.prompt_overhead + self.tokens_a_word * len(prompt.split())
            told = given - 1 if self.manner == "lies" and tokens > 1 else given
            self.event(writer, {"choices": [], "usage": {"prompt_tokens": count, "completion_tokens": told}})
        writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")

    def event(self, writer: asyncio.StreamWriter, said: dict) -> None:
        data = b"data: " + json.dumps(said).encode() + b"\n\n"
        whole = f"{len(data):x}\r\n".encode() + data + b"\r\n"
        # In two parts, cut where it hurts: within the size of a chunk, or within an event.
        cut = len(self.bodies) % len(whole)
        writer.write(whole[:cut])
        writer.write(whole[cut:])


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    """One that runs in a thread of its own."""
    one, loop, up = Endpoint(), asyncio.new_event_loop(), threading.Event()
    stop = asyncio.Event()

    async def main() -> None:
        server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
        one.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        up.set()
        await stop.wait()
        server.close()

    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    up.wait()
    yield one
    loop.call_soon_threadsafe(stop.set)
    thread.join()
    loop.run_until_complete(asyncio.sleep(0))
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
