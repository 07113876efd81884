"""Engine: requests of many users answered from one model in memory."""

import contextlib
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turnout.errors import ShapeError, UsageError, nearest, word
from turnout.models.checkpoint.live import lm_or_itself
from turnout.models.ends import own_ends
from turnout.models.lm import LM
from turnout.models.pieces import reader_of, stops_of
from turnout.serve.engine.answer import Answer
from turnout.serve.engine.lanes import adapted, lane_of, say_beside
from turnout.serve.engine.loop import Loop
from turnout.serve.engine.paged_lane import PagedLane
from turnout.serve.engine.request import EngineStats, QueueFull, Reason, Request
from turnout.serve.engine.ticket import Ticket
from turnout.wrappers import unwrapped

__all__ = ["Engine"]

_WHERE = "turnout.serve.Engine"
# How often pages are counted.
_LOOK_S = 0.2


class Engine:
    """Takes requests from any thread and answers them from one of its own, each as it would be alone.

    Args:
        model: an ``LM``, or a causal language model of transformers, which is computed as the LM that it is exactly.
        tokenizer: of ``tokenizers`` or transformers; None for tokens without text.
        name: what the model is called.
        adapters: further names, and the PEFT folders of LoRA, or models, that answer to them.
        slots: how many requests go on at once.
        waiting: how many may wait for a slot; beyond that they are refused.
        cache_bytes: for keys and values of all requests together; None for 2,048 positions a slot. Adapters, and models
            that are not compiled, keep theirs beside it; of the latter it is said.
        sharing: whether what was read of prompts is kept, for requests of the same tenant that begin with it.
        fallback: whether a model of transformers that is no LM exactly is run as it is.

    Raises:
        UsageError: a model that is none of these, or fewer than one slot.

    >>> from turnout.models.lm import LMConfig
    >>> engine = Engine(LM(LMConfig(vocab_size=16, width=8, layers=1, heads=2)))
    >>> with engine:
    ...     tokens, end = engine.submit(Request((3, 1, 4), tokens=2)).result(60)
    >>> len(tokens), end.reason
    (2, 'length')

    Source: Yu et al., 2022, "Orca: A Distributed Serving System for Transformer-Based Generative Models" (batches that
    change with every step).
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokenizer: Any = None,
        name: str = "model",
        adapters: Mapping[str, str | Path | nn.Module] | None = None,
        slots: int = 16,
        waiting: int = 256,
        cache_bytes: int | None = None,
        sharing: bool = True,
        fallback: bool = False,
    ) -> None:
        if slots < 1 or waiting < 0:
            got, fix = f"{slots} and {waiting}", "pass slots=16, waiting=256"
            raise UsageError(word("slots and waiting", got=got, allowed="be at least 1, and 0", where=_WHERE, fix=fix))
        inside = unwrapped(model)
        self.lm: Any = inside if isinstance(inside, LM) else lm_or_itself(inside, fallback=fallback)
        self.lm.eval()
        config: Any = self.lm.config
        self.ends, self.tokenizer, self.vocab_size = own_ends(inside), tokenizer, int(config.vocab_size)
        self.max_seq: int | None = getattr(config, "max_seq", None) or getattr(config, "max_position_embeddings", None)
        self._reader, self._slots, self._most_waiting = reader_of(tokenizer, _WHERE), slots, waiting
        lanes = {name: lane_of(self.lm, slots, cache_bytes, sharing)}
        if adapters and cache_bytes is not None and isinstance(lanes[name], PagedLane):
            say_beside(cache_bytes, slots)
        for other, one in (adapters or {}).items():
            if other in lanes:
                allowed, fix = "have names other than the model's", "name it otherwise"
                raise UsageError(word("adapters", got=repr(other), allowed=allowed, where=_WHERE, fix=fix))
            lanes[other] = adapted(self.lm, one)
        self._loop = Loop(lanes, slots)
        self._turn = threading.Condition()
        self._arrived: list[Answer] = []
        self._left: set[int] = set()
        self._answers: dict[int, Answer] = {}
        self._thread: threading.Thread | None = None
        self._draining = self._closing = False
        self._trouble, self._number = "", 0
        self._usage, self._looked_s = self._pages(), 0.0

    def models(self) -> tuple[str, ...]:
        """The names that requests may be answered by, the model's own first."""
        return tuple(self._loop.lanes)

    def start(self) -> None:
        """Begins to answer; nothing if it has begun."""
        with self._turn:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="turnout engine", daemon=True)
                self._thread.start()

    def __enter__(self) -> "Engine":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def submit(self, request: Request) -> Ticket:
        """Takes a request on. It may be cancelled from then on.

        Raises:
            QueueFull: too many wait; when to come again stands in it.
            UsageError: what can never be answered: ids outside the vocabulary, an unknown name, a text that is longer
                than the model or its memory takes; or the engine has ended.
        """
        self._check(request)
        with self._turn:
            if self._trouble or self._closing or self._draining:
                why = self._trouble or "one that is closing"
                raise UsageError(word("the engine", got=why, allowed="run", where=_WHERE, fix="start another one"))
            waiting = len(self._answers) - len(self._loop.running)
            if waiting >= self._most_waiting + self._slots - min(len(self._loop.running), self._slots):
                after_s = max(1.0, self._loop.seconds * waiting)
                fix = f"come again in {after_s:.0f} s"
                full = word("the queue", got=f"{waiting} waiting", allowed="have room", where=_WHERE, fix=fix)
                raise QueueFull(full, retry_after_s=after_s)
            self._number += 1
            ticket = Ticket(request, self._number, leave=self._leave)
            answer = Answer(ticket, self._reader, self.vocab_size)
            self._answers[ticket.number] = answer
            self._arrived.append(answer)
            self._turn.notify_all()
        return ticket

    def stats(self) -> EngineStats:
        """How it does; a glance, while it goes on."""
        loop = self._loop
        loads = [lane.load_LE for lane in loop.lanes.values() if lane.load_LE is not None]
        with self._turn:
            going = sum(answer.ticket.finished is None for answer in list(self._answers.values()))
            running, usage = min(len(loop.running), going), self._usage
            return EngineStats(
                alive=self._thread is not None and self._thread.is_alive() and not self._trouble,
                slots=self._slots,
                running=running,
                waiting=going - running,
                pages=usage[0],
                pages_used=usage[1],
                pages_kept=usage[2],
                tokens_in=loop.tokens_in,
                tokens_cached=loop.tokens_cached,
                tokens_out=loop.tokens_out,
                finished=dict(loop.finished),
                preempted=loop.preempted,
                step_rows=len(loop.together),
                together=loop.together,
                expert_load=tuple(map(tuple, loads[0].tolist())) if loads else (),
                trouble=self._trouble,
                counts=self._counts(),
            )

    def drain(self, timeout_s: float) -> bool:
        """Takes nothing new on and waits until all is answered; whether it was by then."""
        with self._turn:
            self._draining = True
            return self._turn.wait_for(lambda: not self._answers, timeout_s)

    def close(self) -> None:
        """Ends at once; what is not answered is told that it is cancelled."""
        with self._turn:
            self._closing = True
            self._turn.notify_all()
        if self._thread is None:
            self._give_up("cancelled")
        else:
            self._thread.join()

    def _leave(self, ticket: Ticket) -> None:
        with self._turn:
            self._left.add(ticket.number)
            self._turn.notify_all()

    def _check(self, request: Request) -> None:
        ids = (*request.prompt, *request.eos)
        if wrong := [one for one in (min(ids), max(ids)) if not 0 <= one < self.vocab_size]:
            allowed, fix = f"be from 0 to {self.vocab_size - 1}", "use the model's own tokenizer"
            raise UsageError(word("token ids", got=wrong[0], allowed=allowed, where=_WHERE, fix=fix))
        name, names = request.adapter, self.models()
        if name is not None and name not in names:
            raise nearest(name, names, kind="model", where=_WHERE)
        stops_of(request.stop, self._reader, _WHERE)
        request.drawing.check_ids(self.vocab_size)
        prompt, tokens, most = len(request.prompt), request.tokens, self.max_seq
        if most is not None and prompt + tokens > most:
            fix = f"ask for at most {max(0, most - prompt)} tokens"
            got = f"{prompt} tokens and {tokens} more"
            raise ShapeError(word("prompt and tokens", got=got, allowed=f"end within {most}", where=_WHERE, fix=fix))
        if (why := self._loop.lanes[names[0] if name is None else name].why_never(prompt, tokens)) is not None:
            fix = "ask for less, or give the engine more cache_bytes"
            raise ShapeError(word("prompt and tokens", got=why, allowed="fit into memory", where=_WHERE, fix=fix))

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while self._meet():
                self._loop.admit()
                self._loop.turn()
        except BaseException as error:  # whatever it is, nobody waits for ever
            with self._turn:
                self._trouble = f"the engine ended: {type(error).__name__}: {error}"
            raise
        finally:
            self._give_up("error" if self._trouble else "cancelled")

    def _meet(self) -> bool:
        """Hears of those who come and go, waits where there is nothing to do; whether it is to go on."""
        with self._turn:
            for number in [number for number, one in self._answers.items() if one.ticket.finished is not None]:
                del self._answers[number]
            self._look()
            if not self._answers:
                self._loop.together = ()
                self._left.clear()
                self._turn.notify_all()
                self._turn.wait_for(lambda: bool(self._answers) or self._closing)
            for answer in self._arrived:
                self._loop.turns.add(answer)
            self._arrived.clear()
            left = [self._answers[number] for number in self._left if number in self._answers]
            self._left.clear()
            closing = self._closing
        for answer in left:
            self._loop.cancel(answer)
        return not closing

    def _counts(self) -> dict[str, float]:
        """Of experts in slots: what was there, and what was waited for."""
        experts = getattr(self.lm, "experts", None)
        if experts is None:
            return {}
        told = experts.stats()
        names = ("slots", "hits", "misses", "waits_s", "fetched_bytes", "prefetched", "prefetched_used", "evicted")
        return {f"expert_{name}": getattr(told, name) for name in names}

    def _look(self) -> None:
        """Counts pages now and then, and whenever there is nothing else to do: others read the sums alone."""
        now_s = time.monotonic()
        if not self._answers or now_s > self._looked_s + _LOOK_S:
            self._usage, self._looked_s = self._pages(), now_s

    def _pages(self) -> tuple[int, int, int]:
        usages = [lane.usage() for lane in self._loop.lanes.values() if isinstance(lane, PagedLane)]
        return sum(one[0] for one in usages), sum(one[1] for one in usages), sum(one[2] for one in usages)

    def _give_up(self, reason: Reason) -> None:
        """Tells all that are left."""
        with self._turn:
            for answer in self._answers.values():
                with contextlib.suppress(Exception):  # of who listens: the others are to hear it too
                    answer.end(reason, self._trouble)
            self._answers.clear()
            self._turn.notify_all()
