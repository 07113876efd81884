"""Sends requests: when each is due, whatever the server does (open loop), or as fast as answers come (closed loop)."""

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence

from turnout.serve.load.answer import Answer
from turnout.serve.load.ask import ask
from turnout.serve.load.exchange import Target
from turnout.serve.load.traffic import Asked

__all__ = ["Driven", "closed_loop", "open_loop"]

# How often the event loop is asked how late it is.
_BEAT_S = 0.02


@dataclasses.dataclass(frozen=True)
class Driven:
    """What came of a stream of requests.

    Args:
        answers: in the order of the requests.
        begun_s: when the first was due, by the clock of the answers.
        busy_s: until when all streams of a closed loop had work; of an open loop, until the last answer.
        client_cpu_s: what the client itself took.
        lag_s: how late the client's own event loop was, each time it was asked: so late may any time be.

    Source: none; plain bookkeeping.
    """

    answers: tuple[Answer, ...]
    begun_s: float
    busy_s: float
    client_cpu_s: float
    lag_s: tuple[float, ...]


async def open_loop(
    target: Target,
    requests: Sequence[Asked],
    due_s: Sequence[float],
    *,
    timeout_s: float = 600.0,
    fixed: bool = False,
    told: Callable[[int], None] | None = None,
) -> Driven:
    """Sends each request when it is due, however many are still unanswered.

    Args:
        target: where to.
        requests: what.
        due_s: (N,) when, after the start, in order.
        timeout_s: the longest that one may take.
        fixed: whether answers shorter than asked for are failures.
        told: is called with the number of requests that are over.

    Source: Schroeder et al., "Open versus closed", 2006; Tene's "coordinated omission": every wait counts from when the
        request was due, not from when a busy client came round to sending it.
    """
    loop = asyncio.get_running_loop()
    watch, over = _Watch(loop), itertools.count(1)
    start = loop.time()
    running: list[asyncio.Task[Answer]] = []

    def count(_: object) -> None:
        if told is not None:
            told(next(over))

    for asked, after in zip(requests, due_s, strict=True):
        due = start + after
        if (wait := due - loop.time()) > 0:
            await asyncio.sleep(wait)
        one = ask(target, asked.request, asked_tokens=asked.tokens, due_s=due, timeout_s=timeout_s, fixed=fixed)
        running.append(asyncio.ensure_future(one))
        running[-1].add_done_callback(count)
    answers = tuple(await asyncio.gather(*running))
    return watch.driven(answers, start, max(answer.ended_s for answer in answers))


async def closed_loop(
    target: Target,
    requests: Sequence[Asked],
    streams: int,
    *,
    timeout_s: float = 600.0,
    fixed: bool = False,
    told: Callable[[int], None] | None = None,
) -> Driven:
    """So many users, each of whom asks again as soon as there is an answer.

    Args:
        target: where to.
        requests: what, in order; whoever is free takes the next.
        streams: how many users.
        timeout_s: the longest that one may take.
        fixed: whether answers shorter than asked for are failures.
        told: is called with the number of requests that are over.

    Source: as ``open_loop``.
    """
    loop = asyncio.get_running_loop()
    watch, answers = _Watch(loop), list[Answer | None]([None] * len(requests))
    start, waiting, idle_s = loop.time(), list(range(len(requests)))[::-1], list[float]()

    over = itertools.count(1)

    def count() -> None:
        if told is not None:
            told(next(over))

    async def user() -> None:
        while waiting:
            number = waiting.pop()
            asked = requests[number]
            answers[number] = await ask(
                target, asked.request, asked_tokens=asked.tokens, timeout_s=timeout_s, fixed=fixed
            )
            count()
        idle_s.append(loop.time())

    await asyncio.gather(*(user() for _ in range(min(streams, len(requests)))))
    return watch.driven(tuple(answer for answer in answers if answer is not None), start, idle_s[0])


class _Watch:
    """Measures the client: its processor time, and how late its event loop is."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop, self._lag = loop, list[float]()
        self._cpu = time.process_time()
        self._task = asyncio.ensure_future(self._beat())

    async def _beat(self) -> None:
        while True:
            due = self._loop.time() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            self._lag.append(self._loop.time() - due)

    def driven(self, answers: tuple[Answer, ...], begun_s: float, busy_s: float) -> Driven:
        self._task.cancel()
        return Driven(answers, begun_s, busy_s, time.process_time() - self._cpu, tuple(self._lag))
