"""The same function on several processes of this machine, which find each other as under torchrun."""

import multiprocessing
import multiprocessing.connection
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch

from turnout.errors import TrainingError, TurnoutError, word
from turnout.run.processes import Ranks, end, start

__all__ = ["locally"]

_WHERE = "turnout.run.locally"


def locally(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0) -> list[Any]:
    """What ``function(ranks, *arguments)`` returns on each of ``world`` processes here, on gloo, with a thread each.

    Args:
        world: how many processes.
        function: at the top of its module; it and all that passes must pickle.
        arguments: what else it takes.
        timeout_s: how long the processes wait for each other, and this one for them.

    Returns:
        One value for each rank.

    Raises:
        TurnoutError: what a rank raised.
        TrainingError: a rank ended without a word, failed, or did not end in time; all are stopped.

    Source: none; multiprocessing's spawn.
    """
    context = multiprocessing.get_context("spawn")
    port, pipes, children = _free_port(), [], []
    try:
        for rank in range(world):
            ours, theirs = context.Pipe(duplex=False)
            child = context.Process(
                target=_child, args=(theirs, rank, world, port, timeout_s, function, arguments), daemon=True
            )
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        return _collect(pipes, timeout_s)
    finally:
        for child in children:
            child.join(timeout=0.5)
            if child.is_alive():
                child.kill()
                child.join()


def _collect(pipes: Sequence[multiprocessing.connection.Connection], timeout_s: float) -> list[Any]:
    found: dict[int, Any] = {}
    until = time.monotonic() + timeout_s + 60  # torch takes its time to load
    while len(found) < len(pipes):
        left = [pipe for rank, pipe in enumerate(pipes) if rank not in found]
        ready = multiprocessing.connection.wait(left, timeout=max(0.0, until - time.monotonic()))
        if not ready:
            silent = ", ".join(str(rank) for rank in range(len(pipes)) if rank not in found)
            got, fix = f"nothing from rank {silent} in {timeout_s:g} s", "look at what they wait for, or wait longer"
            raise TrainingError(word("every rank", got=got, allowed="answer", where=_WHERE, fix=fix))
        for pipe in ready:
            rank = pipes.index(pipe)  # pyrefly: ignore[bad-argument-type]
            found[rank] = _answer(pipe, rank)
    return [found[rank] for rank in range(len(pipes))]


def _answer(pipe: Any, rank: int) -> Any:
    try:
        kind, value = pipe.recv()
    except EOFError as error:
        got, fix = f"rank {rank} ended without a word", "see what it wrote; it may have had too little memory"
        raise TrainingError(word("every rank", got=got, allowed="answer", where=_WHERE, fix=fix)) from error
    if kind == "error":
        raise value
    if kind == "trace":
        fix = "report it; this is a defect"
        raise TrainingError(word("every rank", got=f"rank {rank}: {value}", allowed="end well", where=_WHERE, fix=fix))
    return value


def _child(
    pipe: Any, rank: int, world: int, port: int, timeout_s: float, function: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    for name in ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        os.environ.pop(name, None)
    try:
        ranks: Ranks = start(timeout_s=timeout_s, device="cpu")
        said = ("value", function(ranks, *arguments))
        end()
    except TurnoutError as error:
        said = ("error", error)
    except Exception:
        said = ("trace", traceback.format_exc())
    try:
        pipe.send(said)
    except (pickle.PicklingError, TypeError, AttributeError):
        pipe.send(("trace", f"what it says does not pickle: {said!r:.500}"))
    pipe.close()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]
