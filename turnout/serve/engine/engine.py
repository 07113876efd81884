"""Engine: requests of many users answered from one model in memory."""

import threading
from collections import Counter, deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from turnout.errors import ShapeError, TurnoutError, UsageError, nearest, word
from turnout.models.checkpoint.live import lm_or_itself
from turnout.models.decoding import Decoder
from turnout.models.ends import own_ends
from turnout.models.lm import LM
from turnout.models.pieces import reader_of, stops_of
from turnout.serve.engine.answer import Answer
from turnout.serve.engine.request import EngineStats, QueueFull, Request
from turnout.serve.engine.ticket import Ticket
from turnout.wrappers import unwrapped

__all__ = ["Engine"]

_WHERE = "turnout.serve.Engine"


class Engine:
    """Takes requests from any thread and answers them from one of its own, each as it would be alone.

    Args:
        model: an ``LM``, or a causal language model of transformers, which is computed as the LM that it is exactly.
        tokenizer: of ``tokenizers`` or transformers; None for tokens without text.
        name: what the model is called.
        adapters: further names, and the PEFT folders of LoRA, or models, that answer to them.
        slots: how many requests go on at once.
        waiting: how many may wait for a slot; beyond that they are refused.
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
        fallback: bool = False,
    ) -> None:
        if slots < 1 or waiting < 0:
            got, fix = f"{slots} and {waiting}", "pass slots=16, waiting=256"
            raise UsageError(word("slots and waiting", got=got, allowed="be at least 1, and 0", where=_WHERE, fix=fix))
        inside = unwrapped(model)
        self.lm: Any = inside if isinstance(inside, LM) else lm_or_itself(inside, fallback=fallback)
        self.lm.eval()
        self.ends, self.tokenizer, self._name = own_ends(inside), tokenizer, name
        config: Any = self.lm.config
        self.vocab_size: int = config.vocab_size
        self.max_seq: int | None = getattr(config, "max_seq", None)
        self._reader, self._slots, self._most_waiting = reader_of(tokenizer, _WHERE), slots, waiting
        self._adapters = dict(adapters or {})
        self._turn = threading.Condition()
        self._waiting: deque[Answer] = deque()
        self._running: list[Answer] = []
        self._left: set[int] = set()
        self._thread: threading.Thread | None = None
        self._closing, self._trouble, self._number = False, "", 0
        self._finished: Counter[str] = Counter()
        self._out = self._in = 0

    def models(self) -> tuple[str, ...]:
        """The names that requests may be answered by, the model's own first."""
        return (self._name, *self._adapters)

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
                than the model takes.
        """
        self._check(request)
        with self._turn:
            if self._trouble or self._closing:
                fix = "start another one"
                why = self._trouble or "it is closing"
                raise UsageError(word("the engine", got=why, allowed="be running", where=_WHERE, fix=fix))
            if len(self._waiting) >= self._most_waiting:
                full = word(
                    "the queue",
                    got=f"{len(self._waiting)} waiting",
                    allowed="have room",
                    where=_WHERE,
                    fix="come again later",
                )
                raise QueueFull(full, retry_after_s=1.0)
            self._number += 1
            ticket = Ticket(request, self._number, leave=self._leave)
            self._waiting.append(Answer(ticket, self._reader, self.vocab_size))
            self._turn.notify_all()
        return ticket

    def stats(self) -> EngineStats:
        """How it does."""
        with self._turn:
            alive = self._thread is not None and self._thread.is_alive() and not self._trouble
            return EngineStats(
                alive=alive,
                slots=self._slots,
                running=len(self._running),
                waiting=len(self._waiting),
                tokens_in=self._in,
                tokens_out=self._out,
                finished=dict(self._finished),
                step_rows=len(self._running),
                together=tuple(answer.ticket.number for answer in self._running),
                trouble=self._trouble,
            )

    def drain(self, timeout_s: float) -> bool:
        """Takes nothing new on and waits until all is answered; whether it was by then."""
        with self._turn:
            self._closing = True
            return self._turn.wait_for(lambda: not self._waiting and not self._running, timeout_s)

    def close(self) -> None:
        """Ends at once; what is not answered is told that it is cancelled."""
        with self._turn:
            self._closing = True
            self._left |= {answer.ticket.number for answer in (*self._waiting, *self._running)}
            self._turn.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _leave(self, ticket: Ticket) -> None:
        with self._turn:
            self._left.add(ticket.number)
            self._turn.notify_all()

    def _check(self, request: Request) -> None:
        if wrong := [one for one in (*request.prompt, *request.eos) if not 0 <= one < self.vocab_size]:
            allowed, fix = f"be from 0 to {self.vocab_size - 1}", "use the model's own tokenizer"
            raise UsageError(word("token ids", got=wrong[0], allowed=allowed, where=_WHERE, fix=fix))
        if request.adapter is not None and request.adapter not in self.models():
            raise nearest(request.adapter, self.models(), kind="model", where=_WHERE)
        stops_of(request.stop, self._reader, _WHERE)
        need, most = len(request.prompt) + request.tokens, self.max_seq
        if most is not None and need > most:
            got = f"{len(request.prompt)} tokens and {request.tokens} more"
            fix = f"ask for at most {max(0, most - len(request.prompt))} tokens"
            raise ShapeError(word("prompt and tokens", got=got, allowed=f"end within {most}", where=_WHERE, fix=fix))

    @torch.no_grad()
    def _run(self) -> None:
        try:
            while self._next():
                pass
        except BaseException as error:  # whatever it is, nobody waits for ever
            self._trouble = f"the engine ended: {type(error).__name__}: {error}"
            raise
        finally:
            with self._turn:
                for answer in (*self._running, *self._waiting):
                    answer.end("error" if self._trouble else "cancelled", self._trouble)
                self._running, self._waiting = [], deque()
                self._turn.notify_all()

    def _next(self) -> bool:
        """Answers one request; whether there may be another."""
        with self._turn:
            self._turn.wait_for(lambda: bool(self._waiting) or self._closing)
            if not self._waiting:
                return False
            answer = self._waiting.popleft()
            self._running = [answer]
        try:
            self._answer(answer)
        except Exception as error:  # one that fails takes no other down
            answer.end("error", str(error) if isinstance(error, TurnoutError) else f"{type(error).__name__}: {error}")
        with self._turn:
            self._running = []
            end = answer.ticket.finished
            self._finished[end.reason if end else "error"] += 1
            self._turn.notify_all()
        return True

    def _answer(self, answer: Answer) -> None:
        request = answer.request
        steps = Decoder(self.lm, 1, len(request.prompt) + request.tokens)
        if answer.ticket.number in self._left:
            return answer.end("cancelled")
        score_1V = steps.prefill(torch.tensor([request.prompt]))
        self._in += len(request.prompt)
        while True:
            if answer.ticket.number in self._left:
                return answer.end("cancelled")
            ended = answer.take(score_1V[0])
            self._out += 1
            if ended:
                return
            score_1V = steps.step(torch.tensor(answer.ids[-1:]))
