"""The thinnest fair server around llama.cpp: its wheel has none. For benchmarks.serving.

    python -m benchmarks.llama_server GGUF TOKENIZER PORT THREADS STREAMS ROOM

What llama.cpp's own server does, and no more: every step is one batch of one token for each stream that answers and as
much of the waiting prompts as fits into the 512 tokens that it takes at once by default; greedy; streams of OpenAI's
``/v1/completions``. A thread computes, an event loop talks. Of a step's time, all but a few percent is llama.cpp's.
"""

import asyncio
import dataclasses
import json
import os
import sys
import threading
import traceback
from typing import Any

from benchmarks.llama_cpp import Llama

_ONCE = 512


@dataclasses.dataclass
class Asked:
    """A request: what is left of its prompt, how many tokens it may have, and who hears of them."""

    ids: list[int]
    most: int
    heard: asyncio.Queue[int | None]
    read: int = 0
    made: int = 0
    last: int = -1


class Worker:
    """Feeds streams, step by step."""

    def __init__(self, llama: Llama, streams: int, loop: asyncio.AbstractEventLoop) -> None:
        self.llama, self.loop = llama, loop
        self.slots: list[Asked | None] = [None] * streams
        self.waiting: list[Asked] = []
        self.more = threading.Condition()

    def add(self, asked: Asked) -> None:
        """Takes a request on."""
        with self.more:
            self.waiting.append(asked)
            self.more.notify()

    def run(self) -> None:
        """For ever; where llama.cpp fails, the server ends, so that nobody waits for an answer."""
        try:
            self._run()
        except BaseException:
            traceback.print_exc()
            os._exit(1)

    def _run(self) -> None:
        while True:
            with self.more:
                while not self.waiting and not any(self.slots):
                    self.more.wait()
                for number, one in enumerate(self.slots):
                    if one is None and self.waiting:
                        self.slots[number] = self.waiting.pop(0)
                        self.llama.forget(number)
            self.step()

    def step(self) -> None:
        """One batch."""
        room = _ONCE - sum(one is not None and one.read == len(one.ids) for one in self.slots)
        fed: list[list[int]] = []
        for one in self.slots:
            if one is None:
                fed.append([])
            elif one.read == len(one.ids):
                fed.append([one.last])
            else:
                fed.append(one.ids[one.read : one.read + room])
                one.read += len(fed[-1])
                room -= len(fed[-1])
        rows = iter(self.llama.feed(fed))
        for number, (one, new) in enumerate(zip(self.slots, fed, strict=True)):
            if one is None or not new:
                continue
            score_V = next(rows)
            if one.read < len(one.ids):
                continue
            one.last, one.made = int(score_V.argmax()), one.made + 1
            self.tell(one, one.last)
            if one.made == one.most:
                self.tell(one, None)
                self.slots[number] = None

    def tell(self, one: Asked, token: int | None) -> None:
        """In the event loop's thread."""
        self.loop.call_soon_threadsafe(one.heard.put_nowait, token)


class Server:
    """Speaks HTTP."""

    def __init__(self, worker: Worker, tokenizer: Any, room: int) -> None:
        self.worker, self.tokenizer, self.room = worker, tokenizer, room

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request a connection."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            size = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"content-length:")), 0)
            body = await reader.readexactly(size)
            if head.startswith(b"get"):
                said = json.dumps({"data": [{"id": "llama.cpp"}]}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(said) + said)
            else:
                await self.complete(writer, json.loads(body))
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # whoever asked has gone
        finally:
            writer.close()

    async def complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        """Streams the tokens of one answer."""
        ids = self.tokenizer.encode(body["prompt"]).ids
        if len(ids) + body["max_tokens"] > self.room:
            said = json.dumps({"error": {"message": f"at most {self.room} tokens"}}).encode()
            writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n" % len(said) + said)
            return
        asked = Asked(ids, body["max_tokens"], asyncio.Queue())
        self.worker.add(asked)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        while (token := await asked.heard.get()) is not None:
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            self.event(writer, {"choices": [{"index": 0, "text": f" {text}", "finish_reason": None}]})
            await writer.drain()
        self.event(writer, {"choices": [{"index": 0, "text": "", "finish_reason": "length"}]})
        usage = {"prompt_tokens": len(ids), "completion_tokens": asked.made, "total_tokens": len(ids) + asked.made}
        self.event(writer, {"choices": [], "usage": usage})
        writer.write(b"data: [DONE]\n\n")

    @staticmethod
    def event(writer: asyncio.StreamWriter, said: dict[str, Any]) -> None:
        """As ``turnout serve`` and transformers write them."""
        head = {"id": "cmpl-0", "object": "text_completion", "created": 0, "model": "llama.cpp"}
        writer.write(b"data: " + json.dumps(head | said).encode() + b"\n\n")


async def main(gguf: str, tokenizer: str, port: str, threads: str, streams: str, room: str) -> None:
    """Serves until it is ended."""
    from tokenizers import Tokenizer

    llama = Llama(gguf, threads=int(threads))
    llama.renew(context=int(streams) * int(room), streams=int(streams), threads=int(threads), apart=True)
    worker = Worker(llama, int(streams), asyncio.get_running_loop())
    threading.Thread(target=worker.run, daemon=True).start()
    speaks = Server(worker, Tokenizer.from_file(tokenizer), int(room))
    server = await asyncio.start_server(speaks.serve, "127.0.0.1", int(port))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
