"""Tests over several processes: ``spawn(4, function, ...)`` runs a function on four ranks and gives what each returned.

The processes are forked from a server that has loaded torch once, so that a rank starts in a tenth of a second. They
meet in a store that the test holds, as under torchrun, on gloo with one thread each. ``function`` must be at the top of
its module, and its arguments and what it returns must pickle.

    def both(ranks: Ranks, factor: float) -> float: ...

    assert spawn(2, both, 3.0) == [6.0, 6.0]
"""

import contextlib
import dataclasses
import multiprocessing
import multiprocessing.connection
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["Outcome", "outcomes", "spawn"]

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # where ``tests.run.test_processes`` is found, by which a function pickles
    sys.path.append(str(ROOT))
_KIND = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_PRELOAD = ["turnout.run.ranks.processes", "turnout.recipes.spread"]  # loaded once, for all that are forked


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one rank: what its function returned, or the error that it ended with, or that it said nothing."""

    value: Any = None
    error: str = ""
    trace: str = ""
    exit_code: int | None = None


def spawn(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """What ``function(ranks, *arguments)`` returned on each rank; fails with the traceback of each rank that failed.

    Args:
        world: how many processes.
        function: of the test's module, at its top; its first argument is a ``Ranks``, whose group is set up.
        arguments: what else it takes.
        timeout_s: after that long all are killed.
    """
    found = outcomes(world, function, *arguments, timeout_s=timeout_s)
    bad = [
        f"rank {rank} (exit code {o.exit_code}):\n{o.trace or 'it said nothing'}"
        for rank, o in enumerate(found)
        if o.trace or o.exit_code != 0
    ]
    assert not bad, "\n".join(bad)
    return [outcome.value for outcome in found]


def outcomes(
    world: int,
    function: Callable[..., Any],
    *arguments: Any,
    timeout_s: float = 120.0,
    group: bool = True,
    wait_s: float = 60.0,
    patience_s: float = 600.0,
    environment: Callable[[int], Mapping[str, str]] | None = None,
) -> list[Outcome]:
    """What became of each rank, whatever that was: for tests in which ranks fail, die or hang.

    Args:
        world: how many processes.
        function: as for ``spawn``; without a ``group`` it is called as ``function(rank, *arguments)``.
        arguments: what else it takes.
        timeout_s: after that long all that are left are killed.
        group: whether ``turnout.run.ranks.processes.start`` is called first.
        wait_s: what ``start`` is told to wait for other ranks.
        patience_s: once a rank has come to its end, the others have so long to come to theirs.
        environment: rank -> variables to set beside those of torchrun.
    """
    context = multiprocessing.get_context(_KIND)
    if _KIND == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(world):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        } | dict(environment(rank) if environment else {})
        ours, theirs = context.Pipe(duplex=False)
        inside = (theirs, variables, list(sys.path), function, arguments, group, wait_s)
        process = context.Process(target=_inside, args=inside, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    said = _listen(pipes, time.monotonic() + timeout_s, patience_s)
    for process in processes:
        process.join(timeout=10 if said[processes.index(process)] is not None else 0)
        if process.is_alive():
            process.kill()
            process.join()
    del store
    return [Outcome(**(body or {}), exit_code=process.exitcode) for body, process in zip(said, processes, strict=True)]


def _listen(pipes: list[Any], until: float, patience_s: float) -> list[dict[str, Any] | None]:
    """What each rank sent before the time was up; None of one that sent nothing."""
    said: list[dict[str, Any] | None] = [None] * len(pipes)
    waits = dict(zip(pipes, range(len(pipes)), strict=True))
    while waits and (left := until - time.monotonic()) > 0:
        for pipe in multiprocessing.connection.wait(list(waits), timeout=left):
            with contextlib.suppress(EOFError):  # of one that died
                said[waits[pipe]] = pickle.loads(pipe.recv_bytes())
                until = min(until, time.monotonic() + patience_s)
            del waits[pipe]
    return said


def _inside(
    pipe: Any,
    variables: Mapping[str, str],
    path: list[str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    group: bool,
    wait_s: float,
) -> None:
    os.environ.update(variables)
    sys.path[:] = path
    torch.set_num_threads(1)
    from turnout.run.ranks import processes

    def send(body: dict[str, Any]) -> None:
        pipe.send_bytes(pickle.dumps(body))  # tensors by value: their memory goes with this process

    try:
        first = processes.start(timeout_s=wait_s, device="cpu") if group else int(variables["RANK"])
        send({"value": function(first, *arguments)})
        if group:
            processes.end()
    except BaseException as error:
        send({"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()})
        sys.exit(1)
