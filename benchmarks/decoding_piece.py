"""One piece of benchmarks.decoding: a model in one kind with so many threads, by everyone in turn.

Every peer has a process of its own for the piece, and ends with it. Answers are compared before anything is timed.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import llama_cpp
from benchmarks.decoding_limit import must_read, shares
from benchmarks.decoding_models import SHAPES, prepare

__all__ = ["LIMIT", "PEERS", "Cell", "compare", "expected", "piece", "why_absent"]

PEERS, LIMIT = ("turnout", "transformers", "adopted", "llama.cpp"), "limit"
# |logits - those of transformers in fp32| over the norm of those. Ours in few bits are compared with the same weights,
# llama.cpp's with whole ones: it rounds for itself. And it keeps keys and values in fp16.
ALLOWED = {"fp32": 1e-4, "bf16": 5e-2, "int8": 5e-2, "int4": 5e-2}
ALLOWED_LLAMA = {"fp32": 2e-2, "bf16": 5e-2, "int8": 5e-2, "int4": 5e-1}


@dataclasses.dataclass(frozen=True)
class Cell:
    """One thing that is timed.

    Args:
        job: "steps", "prefill" or "generate".
        streams: that go on at once.
        context: the tokens that each has read before.
        tokens: of one turn, each stream.
    """

    job: str
    streams: int
    context: int
    tokens: int

    @property
    def says(self) -> str:
        """In words."""
        if self.job == "steps":
            return f"{self.streams} stream{'s' * (self.streams > 1)} after {self.context}, a token"
        return f"prefill of {self.tokens}" if self.job == "prefill" else f"generate {self.tokens} after {self.context}"

    @property
    def units(self) -> int:
        """What a turn's time is divided by: the tokens that came out, for steps."""
        return self.streams * self.tokens if self.job == "steps" else 1

    def room(self, rounds: int) -> int:
        """The positions of a stream."""
        return self.context + self.tokens * (rounds + 1 if self.job == "steps" else 1)

    def ask(self, turn: int) -> dict[str, Any]:
        """What is asked of everyone in a turn."""
        more = {"prompt": self.context} if self.job == "generate" else {}
        return {"do": self.job, "tokens": self.tokens, "seed": 100 + turn} | more


class Process:
    """One peer in its process."""

    def __init__(self, name: str, threads: int, errors: Path) -> None:
        python, environment = llama_cpp.command() if name == "llama.cpp" else ([sys.executable], dict(os.environ))
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, [environment.get("PYTHONPATH")])]
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
        self.name, self._errors, self.doing = name, errors, ""
        with errors.open("w", encoding="utf-8") as file:
            self._process = subprocess.Popen(
                [*python, "-m", "benchmarks.decoding_peers", name, str(threads)],
                env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                encoding="utf-8",
            )

    def tell(self, request: Mapping[str, Any]) -> None:
        """Asks, and does not wait."""
        assert self._process.stdin is not None
        self.doing = str(request["do"])
        with contextlib.suppress(BrokenPipeError):  # hear says why
            print(json.dumps(request), file=self._process.stdin, flush=True)

    def hear(self) -> dict[str, Any]:
        """What it answered."""
        assert self._process.stdout is not None
        if line := self._process.stdout.readline():
            return json.loads(line)
        said = self._errors.read_text(encoding="utf-8", errors="replace")[-3000:]
        raise SystemExit(f"{self.name} ended while it did {self.doing!r}:\n{said}")

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Asks, and waits."""
        self.tell(request)
        return self.hear()

    def close(self) -> None:
        """Ends it."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self._process.kill()
        self._process.wait()


@contextlib.contextmanager
def started(names: list[str], threads: int, work: Path) -> Iterator[dict[str, Process]]:
    """The peers' processes, ended afterwards."""
    made = dict[str, Process]()
    try:
        for name in names:
            made[name] = Process(name, threads, work / f"{name}.stderr")
        yield made
    finally:
        for process in made.values():
            process.close()


def everyone(processes: dict[str, Process], request: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Asks all at once, and waits for all."""
    for process in processes.values():
        process.tell(request)
    return {name: process.hear() for name, process in processes.items()}


def why_absent(name: str, shape: str, kind: str) -> str | None:
    """Why a peer has no part in it; None where it has."""
    if name == "llama.cpp":
        return llama_cpp.why_not() or ("no package gguf" if importlib.util.find_spec("gguf") is None else None)
    if name == "adopted" and not SHAPES[shape].has_experts:
        return "a dense model has no experts to adopt"
    if kind in ("int8", "int4") and name != "turnout":
        return "no kernel for few bits without other packages"
    return None


def compare(name: str, kind: str, found: np.ndarray, wanted: np.ndarray) -> float:
    """How far logits are off, relative to the norm; too far ends the run."""
    if found.shape != wanted.shape:
        raise SystemExit(f"no times for wrong answers: logits of {name}, {kind}, are {found.shape}, not {wanted.shape}")
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    allowed = (ALLOWED_LLAMA if name == "llama.cpp" else ALLOWED)[kind]
    if not error <= allowed:
        raise SystemExit(f"no times for wrong answers: logits of {name}, {kind}, are off by {error:.1e} > {allowed}")
    return error


def expected(name: str, kind: str, folder: Path) -> np.ndarray:
    """The logits that a peer must come to."""
    own = ".own" if name == "turnout" and kind in ("int8", "int4") else ""
    return np.load(folder / f"{kind}{own}.npy")


def check(processes: dict[str, Process], kind: str, folder: Path) -> dict[str, float]:
    """How far off everyone's logits are."""
    errors = {}
    for name, process in processes.items():
        path = folder / f"{name}.logits.npy"
        process.ask({"do": "logits", "path": str(path)})
        errors[name] = compare(name, kind, np.load(path), expected(name, kind, folder))
    return errors


def measure(processes: dict[str, Process], cell: Cell, rounds: int, order: random.Random) -> dict[str, Any]:
    """Milliseconds of CPU and wall of everyone in every round, and what they generated."""
    everyone = [name for name in processes if name != LIMIT or cell.job != "generate"]
    times: dict[str, list[list[float]]] = {name: [] for name in everyone}
    made = dict[str, list[list[int]]]()
    for turn in range(-1, rounds):
        for name in order.sample(everyone, len(everyone)):
            found = processes[name].ask(cell.ask(turn))
            made.setdefault(name, []).append(found.get("tokens", []))
            if turn >= 0:
                times[name].append([1e3 * found[clock] / cell.units for clock in ("cpu_s", "wall_s")])
    return {"times": times, "made": made}


def cells(options: argparse.Namespace) -> list[Cell]:
    """What is timed, memory first."""
    steps = [Cell("steps", n, c, max(4, options.tokens // n)) for c in options.context for n in options.streams]
    return [*steps, Cell("prefill", 1, 0, options.prefill), Cell("generate", 1, 32, options.tokens)]


@dataclasses.dataclass
class Piece:
    """A model in one kind with so many threads, and those who run it.

    Args:
        shape: of the model.
        kind: of its weights.
        threads: how many.
        options: of the command line.
        processes: of the peers and the limit.
    """

    shape: str
    kind: str
    threads: int
    options: argparse.Namespace
    processes: dict[str, Process]

    def __post_init__(self) -> None:
        self.folder = self.options.work / self.shape
        self.peers = {name: one for name, one in self.processes.items() if name != LIMIT}
        self.about = {"shape": self.shape, "kind": self.kind, "threads": self.threads}

    def run(self) -> dict[str, Any]:
        """Everything of it."""
        small, order, told = self.options.work / "tiny", random.Random(0), dict[str, Any]()
        everyone(self.processes, {"do": "load", "folder": str(small), "shape": "tiny", "kind": self.kind})
        check(self.peers, self.kind, small)
        before = everyone(self.peers, {"do": "memory"})
        asked = {"do": "load", "folder": str(self.folder), "shape": self.shape, "kind": self.kind}
        loaded = everyone(self.processes, asked)
        if LIMIT in self.processes:
            told = self.processes["turnout"].ask({"do": "read_bytes"})
        found: dict[str, Any] = {"cases": [], "memory": [], "errors": check(self.peers, self.kind, self.folder)}
        for cell in cells(self.options):
            read = self.begin(cell, told, loaded)
            timed = measure(self.processes, cell, self.options.rounds, order)
            if self.kind == "fp32" and len({json.dumps(tokens) for tokens in _greedy(timed["made"])}) > 1:
                raise SystemExit("no times for wrong answers: turnout and transformers generate other tokens in fp32")
            said = self.about | dataclasses.asdict(cell) | {"says": cell.says, "read_bytes": read}
            found["cases"].append(said | {"times": timed["times"]})
            found["memory"] = found["memory"] or self.memory(cell, before, loaded)
        return found

    def begin(self, cell: Cell, told: dict[str, Any], loaded: dict[str, dict[str, Any]]) -> float:
        """Makes everyone ready; the bytes that a step must read."""
        context, room = cell.context if cell.job == "steps" else 0, cell.room(self.options.rounds)
        everyone(self.peers, {"do": "begin", "streams": cell.streams, "context": context, "room": room})
        if not told or cell.job != "steps":
            return 0.0
        positions = (cell.context + room) / 2
        held = loaded["turnout"]["weights_bytes"] + round(cell.streams * positions * told["position"])
        read = must_read(told, shares(self.folder), cell.streams, positions)
        self.processes[LIMIT].ask({"do": "begin", "held_bytes": held, "read_bytes": read})
        return read

    def memory(self, cell: Cell, before: dict[str, Any], loaded: dict[str, Any]) -> list[dict[str, Any]]:
        """What everyone holds after the first streams, and at most so far."""
        cache = SHAPES[self.shape].cache_bytes(
            cell.streams * cell.room(self.options.rounds), 4 if self.kind == "fp32" else 2
        )
        found = []
        for name, now in everyone(self.peers, {"do": "memory"}).items():
            held = {"before_bytes": before[name]["resident_bytes"], "cache_bytes": cache}
            found.append(self.about | {"peer": name} | now | loaded[name] | held)
        return found


def piece(shape: str, kind: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """What was measured of one model in one kind with so many threads."""
    absent = {name: why_absent(name, shape, kind) for name in options.peers}
    names = [name for name in options.peers if absent[name] is None]
    part: dict[str, Any] = {"cases": [], "memory": [], "errors": {}, "absent": {n: w for n, w in absent.items() if w}}
    if not names:
        return part
    for which in ("tiny", shape):
        prepare(which, options.work / which, (kind,), gguf="llama.cpp" in names)
    everyone = [*names, *([LIMIT] if "turnout" in names else [])]  # whose bytes are those that must be read
    with started(everyone, threads, options.work) as processes:
        return part | Piece(shape, kind, threads, options, processes).run()


def _greedy(made: dict[str, list[list[int]]]) -> list[list[list[int]]]:
    return [made[name] for name in ("turnout", "transformers", "adopted") if name in made]
