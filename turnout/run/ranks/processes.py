"""Many processes that train one model: how they find each other, agree before they begin, and miss one that is gone.

``torchrun`` starts the processes and tells each who it is. Since torch 2.6 the processes of one agent meet in the
agent's own key-value store, and ``torch.distributed`` puts no mark of the attempt on the keys: a group that starts
again after a crash reads the addresses of the dead one, and never comes together on gloo. Here the first rank makes a
fresh name for every attempt and hands it to each rank against a number that only the living one has just written, so
that no key of a dead group is read, also where machines count their restarts differently.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist

from turnout.errors import TrainingError, UsageError, word
from turnout.types.device import find_device

__all__ = ["CALLED", "Ranks", "agree", "as_patient", "end", "launched", "named", "seen", "shared", "start"]

_WHERE = "turnout.run.ranks"
_POLL_S, _LISTEN_S = 0.02, 1.0
# The key under which a rank that has missed another calls all of them.
CALLED = "called"
# How long ranks wait for each other's last word once one of them has missed somebody.
_GRACE_S = 5.0
_SHOWN = 200  # letters of a value that ranks differ in


@dataclasses.dataclass(frozen=True)
class Ranks:
    """Who this process is among those that train one model.

    Args:
        rank: its number, from 0.
        world: how many there are.
        local_rank: its number on its machine.
        device: what it computes on.
        timeout_s: how long it waits for the others.
        attempt: the name of this start; the next one after a crash has another.
        store: the key-value store of this start.

    >>> Ranks(rank=1, world=4, local_rank=1, device=torch.device("cpu")).is_first
    False

    Source: none; plain bookkeeping.
    """

    rank: int
    world: int
    local_rank: int
    device: torch.device
    timeout_s: float = 300.0
    attempt: str = ""
    store: dist.Store | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def is_first(self) -> bool:
        """Whether it is the one that speaks and writes for all."""
        return self.rank == 0


def launched() -> bool:
    """Whether ``torchrun`` or another launcher has started this process as one of several.

    >>> launched()
    False

    Source: none; the environment that torchrun sets.
    """
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(*, timeout_s: float = 300.0, backend: str | None = None, device: str = "auto") -> Ranks:
    """Brings the processes of one launch together, also after a restart, and sets torch's process group up.

    Args:
        timeout_s: how long to wait for the others, here and in everything that they do together.
        backend: of torch.distributed; None for gloo on a CPU, and gloo and NCCL on CUDA.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``; on CUDA each process takes the device of its local rank.

    Returns:
        Who this process is.

    Raises:
        UsageError: nothing launched this process as one of several, or what did so says nonsense.
        TrainingError: some rank did not arrive in time; says which.

    >>> start()
    Traceback (most recent call last):
    turnout.errors.UsageError: RANK must be set by a launcher in turnout.run.ranks; got nothing. Nearest fix: ...

    Source: none; https://github.com/pytorch/pytorch/issues/135712 tells what goes wrong without.
    """
    number = {name: _number(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    rank, world, local = number["RANK"], number["WORLD_SIZE"], number["LOCAL_RANK"]
    if not 0 <= rank < world or timeout_s <= 0:
        got, fix = f"RANK={rank} of WORLD_SIZE={world}, {timeout_s} s", "let torchrun set them, and wait for 300 s"
        raise UsageError(word("a rank", got=got, allowed="be one of the world, and wait", where=_WHERE, fix=fix))
    found = find_device(device)
    if found.type == "cuda":
        found = find_device(f"cuda:{local}")
        torch.cuda.set_device(found)
    wait = datetime.timedelta(seconds=timeout_s)
    meeting = _store(rank, number["MASTER_PORT"], wait)
    attempt = _meet(meeting, rank, world, timeout_s)
    store = dist.PrefixStore(f"turnout/{attempt}", meeting)
    kind = backend or ("cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo")
    with _worded(f"rank {rank} could not join the group of {world}"):
        dist.init_process_group(
            kind,
            store=dist.PrefixStore("group", store),
            rank=rank,
            world_size=world,
            timeout=wait,
            device_id=found if found.type == "cuda" else None,
        )
    threading.Thread(target=_answer, args=(store, rank), daemon=True).start()
    return Ranks(rank, world, local, found, timeout_s, attempt, store)


def as_patient(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """A group that was made after the first one, told to wait as long as that: torch gives it half an hour of its own.

    Args:
        group: this process is in it.

    Source: none; torch.distributed.
    """
    world = dist.group.WORLD
    assert world is not None
    for device in world._device_types:
        options = world._get_backend(device).options
        if options is not None:  # torch's fake processes have none, and wait for nobody
            group.set_timeout(options._timeout)
    return group


def end() -> None:
    """Takes the process group down; for a start that went well.

    >>> end()  # nothing was started, nothing happens

    Source: none; torch.distributed.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def agree(what: str, value: str, *, fix: str = "start every rank with the same") -> None:
    """Stops every rank, with the same words, where one has another value than most.

    Args:
        what: what is compared, as the user knows it: ``"the initial weights"``.
        value: this rank's; a hash where it is long.
        fix: what to do when they differ.

    Raises:
        UsageError: on every rank, naming the ranks that differ.

    >>> agree("the plan", "ab12")  # alone, one agrees

    Source: none; plain bookkeeping.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    values = shared(value)
    if len(set(values)) == 1:
        return
    ranks = {each: [rank for rank, one in enumerate(values) if one == each] for each in dict.fromkeys(values)}
    most = max(ranks, key=lambda each: len(ranks[each]))
    others = "; ".join(f"{each:.{_SHOWN}} on {named(those)}" for each, those in ranks.items() if each != most)
    got = f"{others}; {most:.{_SHOWN}} on {named(ranks[most])}"
    raise UsageError(word(what, got=got, allowed="be the same on every rank", where=_WHERE, fix=fix))


def shared(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """What every rank says, in the order of the ranks; all of them call it.

    Args:
        value: this rank's, of plain JSON.
        group: the ranks; all when None.

    >>> shared({"alone": 1})
    [{'alone': 1}]

    Source: none; torch's own would unpickle what comes over the wire.
    """
    if not dist.is_initialized():
        return [value]
    text = json.dumps(value).encode()
    cpu = "gloo" in str(dist.get_backend_config(group))
    device = torch.device("cpu") if cpu else torch.device("cuda", torch.cuda.current_device())
    size_G = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(size_G, torch.tensor([len(text)], device=device), group=group)
    sizes = [int(size) for size in size_G]
    mine = torch.frombuffer(bytearray(text.ljust(max(sizes))), dtype=torch.uint8).to(device)
    rows = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(rows, mine, group=group)
    return [json.loads(row.cpu().numpy().tobytes()[:size]) for row, size in zip(rows, sizes, strict=True)]


def _answer(store: dist.Store, rank: int) -> None:
    """Says that this process lives, once somebody calls; its main thread may wait for one that does not."""
    with contextlib.suppress(RuntimeError):  # the store has gone, and with it all who could ask
        while dist.is_initialized():
            if store.check([CALLED]):
                store.set(f"alive/{rank}", "")
                return
            time.sleep(_LISTEN_S)


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if name == "LOCAL_RANK" and not text:  # launchers that know no machines
        return int(os.environ.get("RANK", "0"))
    if not text.lstrip("-").isdigit():
        got = repr(text) if text else "nothing"
        fix = "start the processes with: torchrun --nproc-per-node 4 -m turnout train ..."
        raise UsageError(word(name, got=got, allowed="be set by a launcher", where=_WHERE, fix=fix))
    return int(text)


def _store(rank: int, port: int, wait: datetime.timedelta) -> dist.Store:
    """The store that all ranks reach: the agent's, or one that rank 0 holds."""
    host = os.environ.get("MASTER_ADDR", "127.0.0.1")
    holds = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    with _worded(f"rank {rank} could not reach the store at {host}:{port}"):
        return dist.TCPStore(host, port, is_master=holds, wait_for_workers=False, timeout=wait, multi_tenant=True)


def _meet(store: dist.Store, rank: int, world: int, timeout_s: float) -> str:
    """The name of this attempt, the same on all ranks that are alive now."""
    mine, attempt, until = secrets.token_hex(8), secrets.token_hex(8), time.monotonic() + timeout_s
    store.set(f"meet/here/{rank}", mine)
    if rank == 0:
        absent = _gather(store, world, attempt, until)
        store.set(f"meet/all/{attempt}", json.dumps(absent))
        if absent:
            raise _absent(absent, world, timeout_s)
        return attempt
    heard = ""
    while time.monotonic() < until:
        attempt, _, to = (seen(store, f"meet/told/{rank}") or "").partition(" ")
        if to == mine and attempt != heard:  # not what was told to one that died
            heard = attempt
            store.set(f"meet/heard/{rank}", heard)
        absent = json.loads(seen(store, f"meet/all/{heard}") or "null") if heard else None
        if absent == []:
            return heard
        if absent:
            break
        time.sleep(_POLL_S)
    else:
        absent = [each for each in range(world) if not store.check([f"meet/here/{each}"])] or [0]
    raise _absent(absent, world, timeout_s)


def _gather(store: dist.Store, world: int, attempt: str, until: float) -> list[int]:
    """Rank 0 tells each rank the attempt against the number that it has written; returns who was not heard of."""
    waits, told = set(range(1, world)), dict[int, str]()
    while waits and time.monotonic() < until:
        for rank in sorted(waits):
            here = seen(store, f"meet/here/{rank}")
            if here is not None and told.get(rank) != here:
                store.set(f"meet/told/{rank}", f"{attempt} {here}")
                told[rank] = here
            if seen(store, f"meet/heard/{rank}") == attempt:
                waits.discard(rank)
        time.sleep(_POLL_S if waits else 0)
    return sorted(waits)


def seen(store: dist.Store, key: str) -> str | None:
    """What is in the store under this key now; None where nothing is. It does not wait.

    Source: none; torch's own store.
    """
    return store.get(key).decode() if store.check([key]) else None


def _absent(absent: Sequence[int], world: int, timeout_s: float) -> TrainingError:
    got, fix = f"nothing from {named(absent)}", "look at what those ranks said, or wait longer with --timeout"
    allowed = f"arrive within {timeout_s:g} s"
    return TrainingError(word(f"all {world} ranks", got=got, allowed=allowed, where=_WHERE, fix=fix))


def named(ranks: Sequence[int]) -> str:
    """The ranks in words.

    >>> named([2]), named([0, 1, 3])
    ('rank 2', 'ranks 0, 1 and 3')

    Source: none; plain text.
    """
    texts = [str(rank) for rank in ranks]
    return f"rank {texts[0]}" if len(texts) == 1 else f"ranks {', '.join(texts[:-1])} and {texts[-1]}"


@contextlib.contextmanager
def _worded(what: str) -> Iterator[None]:
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        fix = "look whether all ranks were started and can reach each other, or wait longer with --timeout"
        got = f"{what} ({str(error).splitlines()[0]:.300})"
        raise TrainingError(word("all ranks", got=got, allowed="come together", where=_WHERE, fix=fix)) from error
