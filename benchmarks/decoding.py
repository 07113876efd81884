"""Times decoding on the CPU: turnout's LM, transformers as it comes and adopted, and llama.cpp, with the same weights.

    python -m benchmarks.decoding --quick
    python -m benchmarks.decoding [--shapes moe olmoe dense] [--kinds fp32 bf16 int8 int4] [--threads 1 2]
        [--streams 1 4 16] [--context 128 2048] [--rounds 5] [--out benchmarks/results] [--docs docs/performance.md]

Each runs in one long-lived process and they take turns in shuffled order in every round, each for a few tokens, so that
what else the machine does meets all of them; ratios are of the same round. Before anything is timed each one's logits,
by the very calls that are timed, are compared with those of transformers in fp32: no times for wrong answers. llama.cpp
takes part where benchmarks/llama-cpp has set it up.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import decoding_bars, few_tokens, llama_cpp
from benchmarks.contestants import Case
from benchmarks.decoding_models import KINDS, SHAPES, prepare
from benchmarks.tables import heading, provenance, spread, write

__all__ = ["Cell", "main", "run", "section"]

PEERS = ("turnout", "transformers", "adopted", "llama.cpp")
# |logits - those of transformers in fp32| over the norm of those. Ours in few bits are compared with the same weights,
# llama.cpp's with whole ones: it rounds for itself. And it keeps keys and values in fp16.
ALLOWED = {"fp32": 1e-4, "bf16": 5e-2, "int8": 5e-2, "int4": 5e-2}
ALLOWED_LLAMA = {"fp32": 2e-2, "bf16": 5e-2, "int8": 5e-2, "int4": 5e-1}
UNMEASURED = "\nNot measured yet.\n"
BEGIN, END = "<!-- decoding: written by benchmarks.decoding --docs -->", "<!-- decoding: end -->"


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
    context = cell.context if cell.job == "steps" else 0
    everyone(processes, {"do": "begin", "streams": cell.streams, "context": context, "room": cell.room(rounds)})
    times: dict[str, list[list[float]]] = {name: [] for name in processes}
    made = dict[str, list[list[int]]]()
    for turn in range(-1, rounds):
        for name in order.sample(list(processes), len(processes)):
            found = processes[name].ask(cell.ask(turn))
            made.setdefault(name, []).append(found.get("tokens", []))
            if turn >= 0:
                times[name].append([1e3 * found[clock] / cell.units for clock in ("cpu_s", "wall_s")])
    return {"times": times, "made": made}


def cells(options: argparse.Namespace) -> list[Cell]:
    """What is timed, memory first."""
    steps = [Cell("steps", n, c, max(4, options.tokens // n)) for c in options.context for n in options.streams]
    return [*steps, Cell("prefill", 1, 0, options.prefill), Cell("generate", 1, 32, options.tokens)]


def of_model(shape: str, kind: str, threads: int, options: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Everything of one model in one kind with so many threads: the record's part, and lines of the page."""
    absent = {name: why_absent(name, shape, kind) for name in options.peers}
    names = [name for name in options.peers if absent[name] is None]
    part: dict[str, Any] = {"cases": [], "memory": [], "errors": {}, "absent": {n: w for n, w in absent.items() if w}}
    if not names:
        return part, []
    folder, small, order = options.work / shape, options.work / "tiny", random.Random(0)
    for which, place in (("tiny", small), (shape, folder)):
        prepare(which, place, (kind,), gguf="llama.cpp" in names)
    with started(names, threads, options.work) as processes:
        everyone(processes, {"do": "load", "folder": str(small), "shape": "tiny", "kind": kind})
        check(processes, kind, small)
        before = everyone(processes, {"do": "memory"})
        loaded = everyone(processes, {"do": "load", "folder": str(folder), "shape": shape, "kind": kind})
        part["errors"] = check(processes, kind, folder)
        for cell in cells(options):
            found = measure(processes, cell, options.rounds, order)
            if kind == "fp32" and len({json.dumps(tokens) for tokens in _greedy(found["made"])}) > 1:
                raise SystemExit("no times for wrong answers: turnout and transformers generate other tokens in fp32")
            about = {"shape": shape, "kind": kind, "threads": threads} | dataclasses.asdict(cell)
            part["cases"].append(about | {"says": cell.says, "times": found["times"]})
            if not part["memory"]:
                positions = cell.streams * cell.room(options.rounds)
                cache = SHAPES[shape].cache_bytes(positions, 4 if kind == "fp32" else 2)
                for name, now in everyone(processes, {"do": "memory"}).items():
                    held = {"before_bytes": before[name]["resident_bytes"], "cache_bytes": cache}
                    part["memory"].append(
                        {"shape": shape, "kind": kind, "threads": threads, "peer": name} | now | loaded[name] | held
                    )
    return part, rows(shape, kind, threads, part)


def _greedy(made: dict[str, list[list[int]]]) -> list[list[list[int]]]:
    return [made[name] for name in ("turnout", "transformers", "adopted") if name in made]


def rows(shape: str, kind: str, threads: int, part: dict[str, Any]) -> list[str]:
    """The section of a page."""
    names = list(part["errors"])
    others = [name for name in names if name != "turnout"] if "turnout" in names else []
    lines = ["", f"## {shape}, {kind}, {threads} thread{'s' * (threads > 1)}", ""]
    lines += ["Logits are off by " + ", ".join(f"{error:.0e} ({name})" for name, error in part["errors"].items()) + "."]
    for name, why in part["absent"].items():
        lines.append(f"Without {name}: {why}.")
    columns = [*(f"{name}, ms" for name in names), *(f"turnout over {name}" for name in others)]
    lines += ["", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for case in part["cases"]:
        for wall in (False, True)[: 1 + (threads > 1)]:
            times = case["times"]
            shown = [f"{statistics.median([one[wall] for one in times[name]]):.2f}" for name in names]
            shown += [spread(decoding_bars.ratios(times, name, wall=wall)) for name in others]
            lines.append(f"| {case['says']}{', wall' * wall} | {' | '.join(shown)} |")
    lines += ["", "Memory over weights and cache, resident (at most): "]
    lines[-1] += ", ".join(
        f"{decoding_bars.resident(one):.2f} ({decoding_bars.resident(one, peak=True):.2f}) of "
        f"{one['weights_bytes'] / 1e6:.0f} MB {one['peer']}"
        for one in part["memory"]
    )
    return [*lines[:-1], lines[-1] + "."]


def alone(shapes: list[str], kinds: list[str], rounds: int) -> list[dict[str, Any]]:
    """The experts of each model by themselves, over one sweep of their weights."""
    found = []
    for shape in shapes:
        keys = SHAPES[shape].keys
        if SHAPES[shape].has_experts:
            hidden = keys.get("moe_intermediate_size", keys["intermediate_size"])
            sizes = keys["hidden_size"], keys["num_experts"], keys["num_experts_per_tok"], hidden
            for kind, counts in decoding_bars.ALONE.items():
                for count in counts if kind in kinds else ():
                    timed = few_tokens.decode(Case(count, *sizes, dtype=kind), rounds, same=True)
                    found.append({"shape": shape, "kind": kind, "rows": count} | timed)
    return found


def run(options: argparse.Namespace) -> tuple[list[str], dict[str, Any]]:
    """The page, and its numbers."""
    torch.set_num_threads(1)
    about = provenance() | {"rounds": options.rounds, "quick": options.quick}
    record: dict[str, Any] = {"about": about, "cases": [], "memory": [], "errors": [], "absent": [], "alone": []}
    said = about | {"threads": ", ".join(map(str, options.threads))}
    lines = heading("Decoding on the CPU: turnout, transformers and llama.cpp", said)
    lines += [f"Medians of {options.rounds} interleaved rounds; CPU time of the process with all its threads, "
              "ratios of the same round (least-most); `OMP_WAIT_POLICY=PASSIVE` for all. llama.cpp is b11739, with its "
              "default cache in fp16; q8_0 and q4_0 stand in the columns of int8 and int4, ours in the same groups of "
              "32."]  # fmt: skip
    print("\n".join(lines), flush=True)
    for shape in options.shapes:
        for kind in options.kinds:
            for threads in options.threads:
                part, new = of_model(shape, kind, threads, options)
                record["cases"] += part["cases"]
                record["memory"] += part["memory"]
                told = {"shape": shape, "kind": kind, "threads": threads}
                record["errors"].append(told | {"errors": part["errors"]})
                record["absent"].append(told | {"absent": part["absent"]})
                print("\n".join(new), flush=True)
                lines += new
    if "turnout" in options.peers:
        record["alone"] = alone(options.shapes, options.kinds, min(options.rounds, 3))
    bars = ["", "## bars", "", *decoding_bars.table(decoding_bars.judge(record))]
    print("\n".join(bars), flush=True)
    return lines + bars, record


def section(record: dict[str, Any], page: str) -> str:
    """What docs/performance.md says of a record: where and when it was measured, and the bars."""
    about = record["about"]
    quick = ", a quick run of few rounds" if about["quick"] else ""
    said = [f"[The page]({page}){quick}: {about['cpu']}, {about['cores']} cores, torch {about['torch']}, commit "
            f"{about['commit']}."]  # fmt: skip
    return "\n".join([BEGIN, *said, "", *decoding_bars.table(decoding_bars.judge(record)), END])


def into(document: str, new: str) -> str:
    """The document with that section in place of the one it has."""
    before, found, rest = document.partition(BEGIN)
    _, ended, after = rest.partition(END)
    if not (found and ended):
        raise SystemExit(f"no section between {BEGIN} and {END}")
    return before + new + after


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, one thread, few rounds: two minutes")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[*PEERS])
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--streams", nargs="+", type=int)
    parser.add_argument("--context", nargs="+", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tokens", type=int, default=16, help="of a turn, over all streams, at least 4 each")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--work", type=Path, help="keep the models there")
    parser.add_argument("--out", type=Path, help="folder for a dated page (markdown) and all times (JSON)")
    parser.add_argument("--docs", type=Path, help="the document whose section is written anew; needs --out")
    options = parser.parse_args(arguments)
    if options.docs and not options.out:
        parser.error("--docs refers to a page: say --out too")
    quick = options.quick
    options.shapes = options.shapes or (["moe"] if quick else ["moe", "olmoe", "dense"])
    options.threads = options.threads or ([1] if quick else [1, 2])
    options.streams = options.streams or ([1, 16] if quick else [1, 4, 16])
    options.context = options.context or ([128] if quick else [128, 2048])
    options.rounds = options.rounds or (3 if quick else 5)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    with tempfile.TemporaryDirectory() as folder:
        options.work = (options.work or Path(folder)).absolute()
        options.work.mkdir(parents=True, exist_ok=True)
        lines, record = run(options)
    write(options.out, "decoding", lines, record)
    if options.docs:
        newest = max(options.out.glob("decoding-*.md"))
        page = Path(os.path.relpath(newest, options.docs.parent)).as_posix()
        text = options.docs.read_text(encoding="utf-8")
        options.docs.write_text(into(text, section(record, page)), encoding="utf-8")


if __name__ == "__main__":
    main()
