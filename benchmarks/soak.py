"""Asks a server of turnout thousands of times, badly too, and looks whether anything is left of it.

    python -m benchmarks.soak [--requests 10000] [--seed 0] [--path FOLDER]

Of the requests 5 % leave mid-stream and 2 % are malformed (wrong fields, broken JSON, other methods and paths), while
one reader takes a few bytes now and then. Some prompts begin alike and are longer than a part that is kept for others,
some tokens are drawn from a seed, and there is little room for keys and values, so that texts give theirs up. Every
answer is compared with ``turnout.generate``'s, every error with OpenAI's format; at the end no slot is taken, and the
server's memory is that of half-time within 2 %. Then it is killed with requests under way, started again, and asked a
hundredth more. Memory is read from /proc: on Linux. Without ``--path`` the model is a tiny one with experts, made
here.
"""

import argparse
import asyncio
import collections
import contextlib
import json
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import torch
from tokenizers import Tokenizer

from turnout import generate
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.train.data import train_tokenizer

__all__ = ["main", "soak"]

TEXT = "the cat and the dog, é 例え 🙂; " + " ".join(f"line {n}: {n * n}" for n in range(90))
STREAMS, TOKENS = 24, 24
SPOILT = ({"n": 0}, {"prompt": 3}, {"stop": [""]}, {"model": "no"}, {"max_tokens": 10**6}, {"x": 1})
BROKEN = (("POST", "/v1/completions", b'{"prompt": "a'), ("POST", "/v1/chat/completions", b'{"messages": 3}'),
          ("POST", "/v1/responses", b"[]"), ("POST", "/v1/completions", b"\xff\xfe"), ("GET", "/v1/completions", None),
          ("POST", "/v1/nothing", b"{}"), ("DELETE", "/v1/models", None))  # fmt: skip
# What is drawn, and how; a key is what is asked beside the prompt.
DRAWN: dict[str, dict[str, Any]] = {"greedy": {"temperature": 0}, "drawn": {"temperature": 1.0, "seed": 7}}
# Tokens of a beginning that some prompts share: more than a part that is kept for others (256).
LONG = 264
# Of keys and values of the tiny model: 42 pages of 64 positions, of which the slow reader alone would take 64.
KV_MEMORY = "690kB"


def made(folder: Path) -> Path:
    """A tiny model with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "width": 16, "layers": 2, "heads": 2, "max_seq": 1024, "init_std": 0.4}
    checkpoint.to_hf(LM(LMConfig(**sizes, moe=MoEConfig(4, 2, 12))), folder)
    train_tokenizer([TEXT], vocab_size=300).save(str(folder / "tokenizer.json"))
    return folder


def answers(folder: Path, prompts: list[str]) -> dict[tuple[str, str], str]:
    """What the model makes of each prompt, alone, each way of drawing."""
    from turnout.train.data.prompt import prompt_ids
    from turnout.train.data.tokenizer import open_tokenizer

    lm, tokenizer = checkpoint.from_hf(folder).eval(), open_tokenizer(folder / "tokenizer.json")
    found = {}
    for prompt in prompts:
        ids = prompt_ids(prompt, tokenizer, own=False, table=None)
        for how, asked in DRAWN.items():
            made = generate(lm, [ids], tokens=TOKENS, tokenizer=tokenizer, eos=None, **asked)
            found[prompt, how] = (made.text_B or ("",))[0]
    return found


class Server:
    """``turnout serve`` in a process."""

    def __init__(self, folder: Path, kv_memory: str | None) -> None:
        command = [sys.executable, "-m", "turnout", "serve", str(folder), "--port", "0", "--no-viewer"]
        command += [] if kv_memory is None else ["--kv-memory", kv_memory]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split(" at ")[1].strip().removesuffix("/v1")

    def memory(self) -> int:
        """Bytes of it that lie in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def counts(self) -> dict[str, int]:
        """What there was of prompts that were read before, and of texts that gave their pages up."""
        page = httpx.get(f"{self.url}/metrics", trust_env=False).text
        found = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
        names = {"prefix_cache_hits": "tokens of prompts known", "num_preemptions": "gave pages up"}
        counts = {said: [value for key, value in found.items() if name in key] for name, said in names.items()}
        return {said: int(float(values[0])) for said, values in counts.items()}

    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        found = httpx.get(f"{self.url}/health", trust_env=False).json()
        return found["running"] == found["waiting"] == 0


async def ask_badly(client: httpx.AsyncClient, chance: random.Random, body: dict[str, Any], seen: Any) -> None:
    """A request that is malformed one way or another."""
    if chance.random() < 0.5:
        found = await client.post("/v1/completions", json=body | chance.choice(SPOILT))
    else:
        method, path, content = chance.choice(BROKEN)
        found = await client.request(method, path, content=content, headers={"Content-Type": "application/json"})
    try:
        error = found.json()["error"]
        fine = set(error) == {"message", "type", "param", "code"} and 400 <= found.status_code < 500
    except (ValueError, KeyError, TypeError):
        fine = False
    seen["refused"] += 1
    seen["errors out of format"] += not fine


async def ask(client: httpx.AsyncClient, chance: random.Random, right: dict[tuple[str, str], str], seen: Any) -> None:
    """One request of one kind or another."""
    (prompt, how), kind = chance.choice(list(right)), chance.random()
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS, "ignore_eos": True, **DRAWN[how]}
    if kind < 0.02:
        await ask_badly(client, chance, body, seen)
    elif kind < 0.07:
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True, "max_tokens": 200}) as found:
            async for _ in found.aiter_bytes():
                break
        seen["left"] += 1
    elif kind < 0.5:
        text = ""
        async with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as found:
            async for line in found.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["text"]
        seen["streamed"] += 1
        seen["wrong answers"] += text != right[prompt, how]
    else:
        found = await client.post("/v1/completions", json=body)
        seen["whole"] += 1
        seen["wrong answers"] += found.status_code != 200 or found.json()["choices"][0]["text"] != right[prompt, how]


async def load(server: Server, requests: int, seed: int, right: dict[tuple[str, str], str]) -> tuple[Any, list[int]]:
    """All requests, so many at once; what came of them, and the memory at ten times of the run."""
    chance, seen, memory = random.Random(seed), collections.Counter(), list[int]()
    left = iter(range(requests))
    limits = httpx.Limits(max_connections=STREAMS, max_keepalive_connections=STREAMS)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as client:

        async def worker() -> None:
            for number in left:
                if number % max(1, requests // 10) == 0:
                    memory.append(server.memory())
                    print(f"{number} of {requests}", file=sys.stderr, flush=True)
                await ask(client, chance, right, seen)

        await asyncio.gather(*(worker() for _ in range(STREAMS)))
    return seen, [*memory, server.memory()]


class SlowReader:
    """A client that asks for much and reads a few bytes now and then.

    Args:
        url: of the server.
        every_s: how long it waits in between.
    """

    def __init__(self, url: str, every_s: float = 0.5) -> None:
        self._sock, self._every_s, self._over = socket.socket(), every_s, threading.Event()
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        self._sock.settimeout(0.1)
        self._sock.connect(("127.0.0.1", int(url.rpartition(":")[2])))
        body = json.dumps({"prompt": "a", "max_tokens": 200, "n": 16, "stream": True, "logprobs": 20}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        self._sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._over.wait(self._every_s):
            with contextlib.suppress(OSError):
                self._sock.recv(16)

    def close(self) -> None:
        """It leaves, with most of its answer unread."""
        self._over.set()
        self._thread.join()
        self._sock.close()


def prompts_of(folder: Path) -> list[str]:
    """Short ones, and some that begin with the same part and a little more."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begin = ""
    for n in range(10**6):
        if len(tokenizer.encode(begin).ids) > LONG:
            break
        begin += f"line {n}: {n * n} "
    return [*(f"line {n}" for n in range(30)), "é 例え", "the cat and the dog " * 8, *(f"{begin}{n}" for n in range(8))]


def soak(folder: Path, *, requests: int, seed: int, kv_memory: str | None = KV_MEMORY) -> dict[str, Any]:
    """What was seen: all that must be 0 is, memory is flat, and a second server answers as the first."""
    right, server = answers(folder, prompts_of(folder)), Server(folder, kv_memory)
    try:
        began_s, slow = time.monotonic(), SlowReader(server.url)
        seen, memory = asyncio.run(load(server, requests, seed, right))
        took_s = time.monotonic() - began_s
        slow.close()
        until = time.monotonic() + 30
        while not server.idle() and time.monotonic() < until:
            time.sleep(0.05)
        half = memory[len(memory) // 2 :]
        result = {
            "requests": requests,
            "seed": seed,
            "seconds": round(took_s, 1),
            **{name: seen[name] for name in ("whole", "streamed", "left", "refused")},
            **server.counts(),
            "wrong answers": seen["wrong answers"],
            "errors out of format": seen["errors out of format"],
            "stuck slots": int(not server.idle()),
            "MB at half-time": round(half[0] / 1e6, 1),
            "MB at the end": round(half[-1] / 1e6, 1),
            "memory over half-time": round(max(half) / half[0], 4),
        }
        pending = SlowReader(server.url)
        server.process.kill()
        server.process.wait()
        pending.close()
    finally:
        server.process.kill()
        server.process.communicate()
    server = Server(folder, kv_memory)
    try:
        seen, _ = asyncio.run(load(server, max(10, requests // 100), seed + 1, right))
        result["wrong after a kill"] = seen["wrong answers"] + seen["errors out of format"]
    finally:
        server.process.kill()
        server.process.communicate()
    return result


def main(argv: list[str] | None = None) -> int:
    """Prints what was seen, a line each; 1 where something is left."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--path", type=Path)
    asked = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as place:
        folder = asked.path or made(Path(place) / "moe")
        memory = None if asked.path else KV_MEMORY
        found = soak(folder, requests=asked.requests, seed=asked.seed, kv_memory=memory)
    for name, value in found.items():
        print(f"{name:<24} {value}")
    bad = sum(found[name] for name in ("wrong answers", "errors out of format", "stuck slots", "wrong after a kill"))
    return int(bad > 0 or found["memory over half-time"] > 1.02)


if __name__ == "__main__":
    sys.exit(main())
