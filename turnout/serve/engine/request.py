"""The nouns of serving: what is asked for, what comes of it token by token, and how it ends."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

from turnout.errors import TurnoutError, UsageError, word
from turnout.models.draw import Drawing

__all__ = ["EngineStats", "Finished", "QueueFull", "Reason", "Request", "Token", "TokenMask"]

Reason = Literal["stop", "length", "cancelled", "error"]
_WHERE = "turnout.serve.Request"


class QueueFull(TurnoutError, RuntimeError):
    """The queue of waiting requests is full.

    Args:
        message: in words.
        retry_after_s: when to try again, in seconds, by what the engine finished of late.

    >>> QueueFull("full", retry_after_s=2.0).retry_after_s
    2.0

    Source: none; what 429 and Retry-After say (RFC 6585).
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class TokenMask(Protocol):
    """Which tokens may come next, told of each that came: a grammar.

    >>> import torch
    >>> class Even:
    ...     done, whole = False, True
    ...     def allowed(self):
    ...         return torch.arange(16) % 2 == 0
    ...     def took(self, token):
    ...         self.done = token == 0
    >>> Request((3, 1, 4), tokens=8, mask=Even()).mask.done
    False

    Source: none; what the matchers of llguidance and xgrammar have.
    """

    @property
    def done(self) -> bool:
        """Whether nothing may follow: the request ends with the token before."""

    @property
    def whole(self) -> bool:
        """Whether a text may end here: elsewhere a token of ``Request.eos`` is one like any other."""

    def allowed(self) -> Tensor:
        """(V,) bool, the tokens that may come next."""

    def took(self, token: int) -> None:
        """Goes on from this token."""


@dataclasses.dataclass(frozen=True)
class Request:
    """One text to go on from.

    Args:
        prompt: its token ids, at least one.
        tokens: the most that are added, at least 1.
        drawing: how each is drawn; by default the likeliest.
        eos: the tokens that end it, which are its last; ``Engine.ends`` has those that the model names. Within what
            a ``mask`` asks for they end nothing.
        stop: texts that end it, found wherever tokens begin and end.
        keep_stop: whether the text ends behind what it stopped at, rather than before.
        seed: of its draws, which depend on the seed and the prompt alone; None for one that nobody knows.
        logprobs: with how many of the likeliest tokens each token's log-probability comes; 0 for its own alone, None
            for none.
        mask: what restricts its tokens, for this request alone; None for nothing.
        adapter: by which name of ``Engine.models`` it is answered; None for the first, the model itself.
        tenant: whose it is: requests of different tenants take turns, and share no memory of prompts.
        routes: whether each token comes with the experts that were taken to make it.

    Raises:
        UsageError: no prompt, fewer than one token, or a count below 0.

    >>> Request((3, 1, 4), tokens=8).drawing.temperature
    0.0

    Source: none; the fields of a completion in OpenAI's API that concern a model.
    """

    prompt: tuple[int, ...]
    tokens: int
    drawing: Drawing = dataclasses.field(default_factory=lambda: Drawing(temperature=0.0))
    eos: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    keep_stop: bool = False
    seed: int | None = None
    logprobs: int | None = None
    mask: TokenMask | None = None
    adapter: str | None = None
    tenant: str = ""
    routes: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            fix = "begin with the token that begins a text"
            raise UsageError(word("prompt", got="none", allowed="have a token", where=_WHERE, fix=fix))
        for name, value, least in (("tokens", self.tokens, 1), ("logprobs", self.logprobs, 0)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < least):
                allowed, fix = f"be a whole number of at least {least}", f"pass {name}={least}"
                raise UsageError(word(name, got=value, allowed=allowed, where=_WHERE, fix=fix))


@dataclasses.dataclass(frozen=True)
class Token:
    """One token more.

    Args:
        id: which.
        text: what can be shown beyond the tokens before it: '' within a character, or where a stop may have begun.
            The texts of a request's tokens are its text.
        logprob: as the model has it, before bias, penalties, temperature, filters and masks; None where it was
            not asked for.
        top: the likeliest tokens and their log-probabilities, the likeliest first.
        routes: for each routed layer the experts that the position was sent to that this token was made at; None where
            they were not asked for, or are not known.
        ends: whether it is a token of ``Request.eos`` that ended the text, and so no part of it.

    >>> Token(7, " the").text
    ' the'

    Source: none; plain bookkeeping.
    """

    id: int
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    routes: tuple[tuple[int, ...], ...] | None = None
    ends: bool = False


@dataclasses.dataclass(frozen=True)
class Finished:
    """How a request ended; nothing follows.

    Args:
        reason: "stop" at a token of ``eos``, a text of ``stop`` or the end of a mask; "length" when its tokens were
            used up; "cancelled"; "error", with a message.
        prompt_tokens: of the prompt.
        cached_tokens: how many of them had been read before, for another request.
        output_tokens: how many were drawn, the one that ended it included.
        message: what went wrong.

    >>> Finished("length", prompt_tokens=3, cached_tokens=0, output_tokens=8).message
    ''

    Source: none; plain bookkeeping.
    """

    reason: Reason
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    message: str = ""


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """How an engine does.

    Args:
        alive: whether it runs; ``trouble`` says why it does not.
        running: how many requests have a slot.
        waiting: how many have none yet.
        slots: how many may have one.
        pages: how many pages of keys and values there are; 0 where nothing is paged.
        pages_used: how many of them texts hold.
        pages_kept: how many of the others hold prompts that were read before, for whoever asks again.
        tokens_in: of prompts, read so far.
        tokens_cached: of prompts, which did not have to be read.
        tokens_out: made so far.
        finished: how many requests ended, by reason.
        preempted: how often a request gave its pages up and was read again later.
        step_rows: how many requests the last step was of.
        together: their numbers, ``Ticket.number``.
        expert_load: for each routed layer how often each expert was taken in steps; empty where nothing counts.
        trouble: what ended the engine.
        counts: further counters by name: of experts in slots, what was there and what was waited for.

    >>> EngineStats(alive=True, slots=4).running
    0

    Source: none; plain bookkeeping.
    """

    alive: bool
    slots: int
    running: int = 0
    waiting: int = 0
    pages: int = 0
    pages_used: int = 0
    pages_kept: int = 0
    tokens_in: int = 0
    tokens_cached: int = 0
    tokens_out: int = 0
    finished: Mapping[str, int] = dataclasses.field(default_factory=dict)
    preempted: int = 0
    step_rows: int = 0
    together: tuple[int, ...] = ()
    expert_load: tuple[tuple[int, ...], ...] = ()
    trouble: str = ""
    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
