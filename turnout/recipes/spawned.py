"""A function on several processes of this machine that form a group, for what is to run without torchrun."""

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from turnout import errors
from turnout.errors import TrainingError, TurnoutError, UsageError, word
from turnout.measure import quantity
from turnout.measure.memory import free_memory
from turnout.run.ranks import processes

__all__ = ["check_bears", "spawned"]

_WHERE = "turnout.recipes.spawned"
# Processes a core of those that take turns: with more, starting them alone takes minutes.
_PER_CORE = 8
_EACH_BYTES = 300_000_000  # that a process takes for itself once torch is loaded; measured 276 MB and more


def check_bears(
    world: int, what: str, *, where: str, fix: str, cores: int | None = None, free: int | None = None
) -> None:
    """Refuses more processes than this machine bears, before any is started.

    Args:
        world: how many.
        what: what asks for them, as the user knows it: ``"--here"``.
        where: for messages.
        fix: what to do, with ``{most}`` where the most that it bears belongs.
        cores: of this machine; None for those that this process may use.
        free: bytes; None for what is said to be free, if anything says so.

    Raises:
        UsageError: too many; says how many this machine bears, and what of.

    >>> check_bears(2, "PLAN", where="turnout parity", fix="use {most}", cores=1, free=10**9)
    >>> check_bears(64, "PLAN", where="turnout parity", fix="use {most}", cores=2, free=10**11)
    Traceback (most recent call last):
    turnout.errors.UsageError: PLAN must be for 16 processes at most, which 2 cores bear, in turnout parity; got 64 ...

    Source: none; plain arithmetic.
    """
    cores = _cores() if cores is None else cores
    free = free_memory() if free is None else free
    bounds = [(max(4, _PER_CORE * cores), f"{cores} core{'s' if cores > 1 else ''}")]
    if free is not None:
        bounds.append((max(1, free // _EACH_BYTES), f"{quantity(free)}B of free memory"))
    most, by = min(bounds)
    if world > most:
        allowed = f"be for {most} processes at most, which {by} bear,"
        raise UsageError(word(what, got=f"{world} processes", allowed=allowed, where=where, fix=fix.format(most=most)))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spawned(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 600.0) -> Any:
    """What ``function(*arguments)`` returns on the first of ``world`` new processes, which are a group on gloo.

    Args:
        world: how many.
        function: at the top of a module; it, its arguments and what it returns must pickle.
        arguments: what it takes.
        timeout_s: after that long all are ended.

    Raises:
        TurnoutError: one of them raised it.
        TrainingError: one of them ended otherwise, or took too long.

    Source: none; torch.distributed as torchrun sets it up.
    """
    context = multiprocessing.get_context("spawn")
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, started = [], []
    for rank in range(world):
        variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}  # fmt: skip
        ours, theirs = context.Pipe(duplex=False)
        inside = (theirs, variables, function, arguments, timeout_s)
        started.append(context.Process(target=_inside, args=inside, daemon=True))
        started[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        return _listen(pipes, time.monotonic() + timeout_s)
    finally:
        for process in started:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
        del store


def _listen(pipes: list[Any], until: float) -> Any:
    """What the first process returned, once all have; the first error ends the waiting."""
    waits: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    first = None
    while waits:
        ready = multiprocessing.connection.wait(list(waits), timeout=max(0.0, until - time.monotonic()))
        if not ready:
            raise _gone(f"no answer of ranks {sorted(waits.values())}", "wait longer, or take a smaller model")
        for pipe in [each for each in waits if each in ready]:
            rank = waits.pop(pipe)
            said: Mapping[str, Any] | None = None
            with contextlib.suppress(EOFError):
                said = pipe.recv()
            if said is None:
                raise _gone(f"rank {rank} ended without a word", "see what it printed; it may have lacked memory")
            if "error" in said:
                raise getattr(errors, said["kind"], TrainingError)(said["error"])
            first = said["value"] if rank == 0 else first
    return first


def _gone(got: str, fix: str) -> TrainingError:
    return TrainingError(word("the processes", got=got, allowed="end well", where=_WHERE, fix=fix))


def _inside(
    pipe: Any, variables: Mapping[str, str], function: Callable[..., Any], arguments: tuple[Any, ...], timeout_s: float
) -> None:
    os.environ.update(variables)
    torch.set_num_threads(1)
    try:
        processes.start(timeout_s=timeout_s, device="cpu")
        pipe.send({"value": function(*arguments)})
        processes.end()
    except TurnoutError as error:
        pipe.send({"kind": type(error).__name__, "error": str(error)})
