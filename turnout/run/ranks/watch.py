"""Ranks that wait for each other: one that does something for all, and who is told when one of them is gone."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist

from turnout import errors
from turnout.errors import TrainingError, TurnoutError, word
from turnout.run.ranks.processes import CALLED, Ranks, named, seen

__all__ = ["answering", "lead"]

_POLL_S = 0.02
# How long ranks wait for each other's last word once one of them has missed somebody.
_GRACE_S = 5.0
_HERE = "is here"
# What gloo calls itself in its messages, and what it says to an operation when another one on the same wire was not
# answered: that one comes without its name.
_GLOO = ("gloo", "application timeout caused pair closure")


@contextlib.contextmanager
def answering(ranks: Ranks, doing: Callable[[], str]) -> Iterator[None]:
    """Says which ranks are gone, where something that ranks do together fails because one is dead, hangs or has failed.

    Args:
        ranks: from ``start``.
        doing: what this rank is at, in words: ``"step 7"``.

    Raises:
        TrainingError: a rank did not answer; says which, and what it said last.

    >>> import torch
    >>> with answering(Ranks(0, 1, 0, torch.device("cpu")), lambda: "step 7"):
    ...     pass

    Source: none; a roll call over the key-value store.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        if not _of_the_wire(error):
            _last_words(ranks, f"stopped with {type(error).__name__}: {error}")
            raise
        raise _roll_call(ranks, doing(), str(error)) from error


def lead(ranks: Ranks, action: Callable[[], Any]) -> Any:
    """What rank 0 gets by doing something for all, on every rank, however long it takes; all of them call it.

    Args:
        ranks: from ``start``.
        action: done by rank 0 alone, such as writing a file; it does nothing together with others. What it returns must
            be plain JSON.

    Returns:
        What the action returned.

    Raises:
        TurnoutError: what the action raised, on every rank.
        TrainingError: rank 0 is gone.

    >>> import torch
    >>> lead(Ranks(0, 1, 0, torch.device("cpu")), lambda: 3)
    3

    Source: none; rank 0 shows in the key-value store that it is alive.
    """
    store = ranks.store
    if store is None or ranks.world == 1:
        return action()
    key = f"lead/{store.add(f'lead/count/{ranks.rank}', 1)}"
    if ranks.is_first:
        over = threading.Event()
        beating = threading.Thread(target=_beat, args=(store, f"{key}/beat", ranks.timeout_s / 8, over), daemon=True)
        beating.start()
        try:
            value = action()
            store.set(f"{key}/done", json.dumps({"value": value}))
        except TurnoutError as error:
            store.set(f"{key}/done", json.dumps({"error": type(error).__name__, "text": str(error)}))
            raise
        finally:
            over.set()
            beating.join()
        return value
    body = _follow(ranks, store, key)
    if "error" in body:
        raise getattr(errors, body["error"])(body["text"])
    return body["value"]


def _beat(store: dist.Store, key: str, every_s: float, over: threading.Event) -> None:
    count = 0
    with contextlib.suppress(RuntimeError):  # a store that is gone is for the others to miss
        while not over.is_set():
            store.set(key, str(count := count + 1))
            over.wait(min(15.0, every_s))


def _follow(ranks: Ranks, store: dist.Store, key: str) -> dict[str, Any]:
    """What rank 0 says when it has done, as long as it shows that it is alive."""
    beat, since = None, time.monotonic()
    while time.monotonic() - since < ranks.timeout_s:
        if (done := seen(store, f"{key}/done")) is not None:
            return json.loads(done)
        if words := seen(store, "last/0"):
            raise _lost(ranks, f"rank 0 {words}")
        if (now := seen(store, f"{key}/beat")) != beat:
            beat, since = now, time.monotonic()
        time.sleep(_POLL_S)
    raise _lost(ranks, f"rank 0 did not answer, dead or hung (waited up to {ranks.timeout_s:g} s)")


def _of_the_wire(error: BaseException) -> bool:
    """Whether torch says by this that the others could not be reached; gloo says so with a plain RuntimeError."""
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and not isinstance(error, TurnoutError)
        and any(words in str(error).lower() for words in _GLOO)
    )


def _last_words(ranks: Ranks, text: str) -> None:
    """Leaves what became of this rank for the others, once, if the store is still there."""
    with contextlib.suppress(RuntimeError):
        if ranks.store is not None:
            ranks.store.compare_set(f"last/{ranks.rank}", "", text[:2000])


def _roll_call(ranks: Ranks, at: str, said: str) -> TrainingError:
    """Which ranks are dead, have failed or hang, in words.

    A dead one has no thread that answers. Of those that live, one that hangs is where the others are not; but who lives
    and still waits for the dead one is not blamed.
    """
    _last_words(ranks, _HERE)
    everyone, words, alive = range(ranks.world), dict[int, str](), {ranks.rank}
    until = time.monotonic() + _GRACE_S
    with contextlib.suppress(RuntimeError):  # the store goes with the one that holds it
        while ranks.store is not None and len(words) < ranks.world and time.monotonic() < until:
            ranks.store.set(CALLED, "")
            words |= {rank: text for rank in everyone if (text := seen(ranks.store, f"last/{rank}")) is not None}
            alive |= {rank for rank in everyone if ranks.store.check([f"alive/{rank}"])}
            time.sleep(_POLL_S)
    failed = [f"rank {rank} {text}" for rank, text in sorted(words.items()) if text != _HERE]
    dead = [rank for rank in everyone if rank not in words and rank not in alive]
    hung = [rank for rank in everyone if rank not in words and not dead and not failed]
    waited = f"after {ranks.timeout_s:g} s"
    lost = [f"{named(dead)} did not answer: dead, or stopped"] if dead else []
    lost += [f"{named(hung)} did not answer {waited}: alive, and elsewhere"] if hung else []
    what = "; ".join([*failed, *lost]) or f"the ranks lost each other ({said:.300})"
    return _lost(ranks, f"in {at}: {what}")


def _lost(ranks: Ranks, got: str) -> TrainingError:
    _last_words(ranks, _HERE)
    fix = "look at what that rank said last; with torchrun --max-restarts 3 a run goes on by itself after this"
    return TrainingError(word("every rank", got=got, allowed="stay in reach", where="turnout.run.ranks.watch", fix=fix))
