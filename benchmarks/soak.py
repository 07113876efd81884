"""Asks a server of turnout thousands of times, badly too, and looks whether anything is left of it.

    python -m benchmarks.soak [--requests 10000] [--seed 0] [--path FOLDER]

Of the requests 5 % leave mid-stream and 2 % are malformed, while one reader takes a byte now and then. Every answer is
compared with ``turnout.generate``'s, every error with OpenAI's format; at the end no slot is taken, and the server's
memory is that of half-time within 2 %. Then it is killed with requests under way, started again, and asked once more.
Memory is read from /proc: on Linux. Without ``--path`` the model is a tiny one with experts, made here.
"""

import argparse
import asyncio
import collections
import json
import random
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import torch

from turnout import generate
from turnout.models import LM, LMConfig, MoEConfig, checkpoint
from turnout.train.data import train_tokenizer

__all__ = ["main", "soak"]

TEXT = "the cat and the dog, é 例え 🙂; " + " ".join(f"line {n}: {n * n}" for n in range(90))
STREAMS, TOKENS = 24, 24
SPOILT = ({"n": 0}, {"prompt": 3}, {"stop": [""]}, {"model": "no"}, {"max_tokens": 10**6}, {"x": 1})


def made(folder: Path) -> Path:
    """A tiny model with its tokenizer."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "width": 16, "layers": 2, "heads": 2, "max_seq": 256, "init_std": 0.4}
    checkpoint.to_hf(LM(LMConfig(**sizes, moe=MoEConfig(4, 2, 12))), folder)
    train_tokenizer([TEXT], vocab_size=300).save(str(folder / "tokenizer.json"))
    return folder


def answers(folder: Path, prompts: list[str]) -> dict[str, str]:
    """What the model makes of each prompt, alone."""
    from turnout.train.data.prompt import prompt_ids
    from turnout.train.data.tokenizer import open_tokenizer

    lm, tokenizer = checkpoint.from_hf(folder).eval(), open_tokenizer(folder / "tokenizer.json")
    found = {}
    for prompt in prompts:
        ids = prompt_ids(prompt, tokenizer, own=False)
        made = generate(lm, [ids], tokens=TOKENS, temperature=0, tokenizer=tokenizer, eos=None)
        found[prompt] = (made.text_B or ("",))[0]
    return found


class Server:
    """``turnout serve`` in a process."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-m", "turnout", "serve", str(folder), "--port", "0", "--no-viewer"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split(" at ")[1].strip().removesuffix("/v1")

    def memory(self) -> int:
        """Bytes of it that lie in memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8")
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])

    def idle(self) -> bool:
        """Whether nothing runs or waits."""
        found = httpx.get(f"{self.url}/health", trust_env=False).json()
        return found["running"] == found["waiting"] == 0


async def ask(client: httpx.AsyncClient, chance: random.Random, right: dict[str, str], seen: Any) -> None:
    """One request of one kind or another."""
    prompt, kind = chance.choice(list(right)), chance.random()
    body: dict[str, Any] = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
    if kind < 0.02:
        spoilt = chance.choice(
            [{"n": 0}, {"prompt": 3}, {"stop": [""]}, {"model": "no"}, {"max_tokens": 10**6}, {"x": 1}]
        )
        found = await client.post("/v1/completions", json=body | spoilt)
        error = found.json()["error"]
        seen["refused"] += 1
        seen["errors out of format"] += set(error) != {"message", "type", "param", "code"} or found.status_code >= 500
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
        seen["wrong answers"] += text != right[prompt]
    else:
        found = await client.post("/v1/completions", json=body)
        seen["whole"] += 1
        seen["wrong answers"] += found.status_code != 200 or found.json()["choices"][0]["text"] != right[prompt]


async def load(server: Server, requests: int, seed: int, right: dict[str, str]) -> tuple[Any, list[int]]:
    """All requests, so many at once; what came of them, and the memory at ten times of the run."""
    chance, seen, memory = random.Random(seed), collections.Counter(), list[int]()
    left = iter(range(requests))
    limits = httpx.Limits(max_connections=STREAMS, max_keepalive_connections=STREAMS)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits, trust_env=False) as client:

        async def worker() -> None:
            for number in left:
                if number % max(1, requests // 10) == 0:
                    memory.append(server.memory())
                await ask(client, chance, right, seen)

        await asyncio.gather(*(worker() for _ in range(STREAMS)))
    return seen, [*memory, server.memory()]


def slow_reader(url: str) -> socket.socket:
    """A client that asks for much and reads nothing yet."""
    port = int(url.rpartition(":")[2])
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
    sock.connect(("127.0.0.1", port))
    body = json.dumps({"prompt": "a", "max_tokens": 200, "n": 16, "stream": True, "logprobs": 20}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock


def soak(folder: Path, *, requests: int, seed: int) -> dict[str, Any]:
    """What was seen: all that must be 0 is, memory is flat, and a second server answers as the first."""
    prompts = [f"line {n}" for n in range(30)] + ["é 例え", "the cat and the dog " * 8]
    right, server = answers(folder, prompts), Server(folder)
    try:
        began_s, slow = time.monotonic(), slow_reader(server.url)
        seen, memory = asyncio.run(load(server, requests, seed, right))
        took_s = time.monotonic() - began_s
        slow.close()
        until = time.monotonic() + 30
        while not server.idle() and time.monotonic() < until:
            time.sleep(0.05)
        half = memory[len(memory) // 2]
        result = {
            "requests": requests,
            "seed": seed,
            "seconds": round(took_s, 1),
            **{name: seen[name] for name in ("whole", "streamed", "left", "refused")},
            "wrong answers": seen["wrong answers"],
            "errors out of format": seen["errors out of format"],
            "stuck slots": int(not server.idle()),
            "MB at half-time": round(half / 1e6, 1),
            "MB at the end": round(memory[-1] / 1e6, 1),
            "memory over half-time": round(memory[-1] / half, 4),
        }
        pending = slow_reader(server.url)
        server.process.kill()
        server.process.wait()
        pending.close()
    finally:
        server.process.kill()
        server.process.communicate()
    server = Server(folder)
    try:
        body = {"prompt": prompts[0], "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        found = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60, trust_env=False)
        result["wrong after a kill"] = int(found.json()["choices"][0]["text"] != right[prompts[0]])
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
        found = soak(folder, requests=asked.requests, seed=asked.seed)
    for name, value in found.items():
        print(f"{name:<24} {value}")
    bad = sum(found[name] for name in ("wrong answers", "errors out of format", "stuck slots", "wrong after a kill"))
    return int(bad > 0 or found["memory over half-time"] > 1.02)


if __name__ == "__main__":
    sys.exit(main())
