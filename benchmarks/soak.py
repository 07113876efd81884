"""Puts turnout serve through what users do to servers, thousands of times, and looks at what is left.

    python -m benchmarks.soak [--requests 10000] [--model RUN] [--users 16] [--out benchmarks/results]

Of the requests 5 % are left in the middle of their answer, 2 % are malformed, 1 % are read slowly; in the middle the
server is killed and started anew. Every whole answer must be what ``turnout.generate`` makes of the prompt alone, every
refusal an error of OpenAI's form, no slot and no page may stay taken, and the server's resident memory may grow by no
more than 2 % over the second half. Exit code 1 where something of this does not hold.
"""

import argparse
import asyncio
import collections
import dataclasses
import json
import random
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.serving_peers import Running, start
from benchmarks.tables import heading, provenance, write
from turnout.serve.load import Answer, Target, ask
from turnout.serve.load.ask import fetch

__all__ = ["Soak", "main"]

LEFT, MALFORMED, SLOW, GROWTH = 0.05, 0.02, 0.01, 0.02
WAYS = ("no JSON", "no prompt", "a prompt of another kind", "an unknown field", "a model that is not there",
        "too many tokens", "tokens outside the vocabulary", "a temperature below 0", "a body of another kind",
        "nothing there")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """A prompt and what the model makes of it alone."""

    prompt: tuple[int, ...]
    tokens: int
    text: str


@dataclasses.dataclass
class Found:
    """What came of it all."""

    right: int = 0
    left: int = 0
    refused: int = 0
    lost: int = 0  # while the server was not there
    wrong: list[str] = dataclasses.field(default_factory=list)
    resident: list[tuple[int, int]] = dataclasses.field(default_factory=list)
    kinds: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


class Soak:
    """One run of it.

    Args:
        folder: of the model.
        cases: prompts and answers.
        requests: how many in all.
        users: how many at once.
        seed: of all chance.
    """

    def __init__(self, folder: Path, cases: list[Case], *, requests: int, users: int, seed: int = 0) -> None:
        self.folder, self.cases, self.requests, self.users = folder, cases, requests, users
        self.chance, self.found, self.sent = random.Random(seed), Found(), 0
        self.server = self._start()
        self.down = False

    def _start(self) -> Running:
        return start("turnout", self.folder, Path(), "fp32", threads=1, streams=self.users // 2 + 1, room=512)

    async def run(self) -> Found:
        """All of it."""
        half = self.requests // 2
        for end in (half, self.requests):
            await asyncio.gather(
                *(self._user(end) for _ in range(self.users)), *([self._kill(half // 2)] if end == half else [])
            )
        await self._empty()
        return self.found

    async def _user(self, end: int) -> None:
        while self.sent < end:
            self.sent += 1
            number, what = self.sent, self.chance.random()
            while self.down:
                await asyncio.sleep(0.05)
            if number % max(1, self.requests // 200) == 0:
                self.found.resident.append((number, self.server.resident_bytes()))
            if what < MALFORMED:
                await self._malformed(self.chance.choice(WAYS))
            else:
                await self._case(self.chance.choice(self.cases), what)

    async def _case(self, case: Case, what: float) -> None:
        server = self.server
        leave = 1 + self.chance.randrange(4) if what < MALFORMED + LEFT else None
        slow = 0.05 if MALFORMED + LEFT <= what < MALFORMED + LEFT + SLOW else 0.0
        body = {"prompt": case.prompt, "max_tokens": case.tokens, "temperature": 0, "stream": True, "ignore_eos": True}
        body |= {"stream_options": {"include_usage": True}}
        target = Target(server.url)
        request = target.request("completions", json.dumps(body).encode())
        answer = await ask(target, request, asked_tokens=case.tokens, timeout_s=300.0, leave_after=leave, pause_s=slow)
        self.found.kinds[answer.error or "whole"] += 1
        if answer.error == "left":
            self.found.left += 1
            self._look(case.text.startswith(answer.text), case, answer)
        elif (answer.error in ("cut", "no connection") and server is not self.server) or self.down:
            self.found.lost += 1
        else:
            self.found.right += 1
            self._look(
                not answer.error and answer.text == case.text and answer.output_tokens == case.tokens, case, answer
            )

    def _look(self, fits: bool, case: Case, answer: Answer) -> None:
        if not fits:
            self.found.wrong.append(
                f"{answer.error or 'another text'} {answer.message}: {answer.text!r} of {case.text!r}"
            )

    async def _malformed(self, way: str) -> None:
        body: Any = {"prompt": [1], "max_tokens": 4}
        changed = {
            "no prompt": {"max_tokens": 4}, "a prompt of another kind": {"prompt": {"a": 1}},
            "an unknown field": body | {"tokens": 4}, "a model that is not there": body | {"model": "gpt-9"},
            "too many tokens": body | {"max_tokens": 1 << 40},
            "tokens outside the vocabulary": body | {"prompt": [1 << 30]}, "a temperature below 0": body | {"temperature": -1},
        }  # fmt: skip
        raw = b"{" if way == "no JSON" else json.dumps(changed.get(way, body)).encode()
        target, server = Target(self.server.url), self.server
        request = target.request("nothing" if way == "nothing there" else "completions", raw)
        if way == "a body of another kind":
            request = request.replace(b"application/json", b"text/plain")
        try:
            status, said = await fetch(target, request)
        except OSError as error:
            if server is self.server and not self.down:
                self.found.wrong.append(f"{way}: {error}")
            return
        self.found.refused += 1
        try:
            error = json.loads(said)["error"]
            fits = 400 <= status < 500 and {"message", "type", "param", "code"} <= set(error) and error["message"]
        except (ValueError, KeyError, TypeError):
            fits = False
        if not fits:
            self.found.wrong.append(f"{way}: status {status}, {said[:200]!r}")

    async def _kill(self, after: int) -> None:
        """Kills the server while it answers, and starts another."""
        while self.sent < after:
            await asyncio.sleep(0.05)
        self.down = True
        self.server.process.send_signal(signal.SIGKILL)
        self.server.process.wait()
        self.found.resident.clear()
        self.server = await asyncio.to_thread(self._start)
        self.down = False

    async def _empty(self) -> None:
        """No slot, and no page beyond those that are kept, is taken when nobody asks."""
        await asyncio.sleep(1.0)
        with urllib.request.urlopen(f"{self.server.url}/health", timeout=30) as answer:
            said = json.loads(answer.read())
        if said["running"] or said["waiting"] or said["status"] != "ready":
            self.found.wrong.append(f"not empty: {said}")


def growth(resident: list[tuple[int, int]], requests: int) -> float:
    """By how much memory grew over the second half: the last quarter's median over the one's before it, less 1."""
    third, fourth = (
        statistics.median(held for number, held in resident if low * requests <= number <= high * requests)
        for low, high in ((0.5, 0.75), (0.75, 1.0))
    )
    return fourth / third - 1


def cases_of(folder: Path, count: int, *, seed: int = 0) -> list[Case]:
    """Prompts of random tokens, many with the same beginning, and what the model makes of each alone."""
    from tokenizers import Tokenizer

    from turnout import generate
    from turnout.recipes.models import opened

    lm = opened(str(folder), "benchmarks.soak", "cpu").lm
    tokenizer, chance = Tokenizer.from_file(str(folder / "tokenizer.json")), random.Random(seed)
    starts = [[chance.randrange(1, 200) for _ in range(40)] for _ in range(4)]
    found = []
    for number in range(count):
        own = [chance.randrange(1, 200) for _ in range(chance.choice((2, 9, 30, 90)))]
        prompt, tokens = [*(chance.choice(starts) if number % 2 else []), *own], chance.choice((4, 12, 24))
        made = generate(lm, [prompt], tokens=tokens, temperature=0.0, eos=None, tokenizer=tokenizer)
        found.append(Case(tuple(prompt), tokens, made.text_B[0]))
    return found


def lines_of(found: Found, requests: int, grown: float, took_s: float) -> list[str]:
    """The page's table."""
    return [
        f"{requests:,} requests in {took_s:,.0f} s; one server killed and started anew in between.",
        "",
        "| | |",
        "|---|---|",
        f"| answers that are what the model makes of the prompt alone | {found.right:,} |",
        f"| left in the middle | {found.left:,} |",
        f"| malformed, refused in OpenAI's form | {found.refused:,} |",
        f"| lost with the server that was killed | {found.lost:,} |",
        f"| wrong | {len(found.wrong):,} |",
        f"| memory, last quarter over the one before | {100 * grown:+.2f} % (at most {100 * GROWTH:.0f} %) |",
        *(["", *(f"- {one}" for one in found.wrong[:20])] if found.wrong else []),
    ]


def main(arguments: list[str] | None = None) -> int:
    """Runs it, and says what it found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a folder with a model and its tokenizer.json")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--users", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for a dated page (markdown) and the numbers (JSON)")
    options = parser.parse_args(arguments)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        folder.symlink_to(options.model.absolute())
        soak = Soak(folder, cases_of(folder, 40), requests=options.requests, users=options.users, seed=options.seed)
        try:
            found = asyncio.run(soak.run())
        finally:
            soak.server.stop()
    grown = growth(found.resident, options.requests)
    about = provenance()
    lines = heading("A server for a while", about)
    lines += lines_of(found, options.requests, grown, time.monotonic() - begun)
    print("\n".join(lines))
    write(options.out, "soak", lines, {"about": about, "found": dataclasses.asdict(found), "growth": grown})
    return 1 if found.wrong or grown > GROWTH or not found.right else 0


if __name__ == "__main__":
    sys.exit(main())
