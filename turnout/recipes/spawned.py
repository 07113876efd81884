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
from turnout.errors import TrainingError, TurnoutError, word
from turnout.run.ranks import processes

__all__ = ["spawned"]

_WHERE = "turnout.recipes.spawned"


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
