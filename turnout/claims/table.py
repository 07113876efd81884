"""The table of claims: many of them measured, in processes of their own if wanted, kept as they finish."""

import concurrent.futures
import hashlib
import json
import multiprocessing
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from turnout import __version__
from turnout.claims.claim import Claim, Note, Result, Values
from turnout.errors import UsageError, word
from turnout.reading import read_json
from turnout.storage import write_whole

__all__ = ["Table", "measured"]

_WHERE = "turnout verify --resume"


class Table:
    """A file of results, written whole after each; what another version of the code measured is not taken up.

    Args:
        path: the file.
        seeds: the seeds of all results in it.
        resume: keep the results that are there, instead of starting empty.

    Raises:
        UsageError: with ``resume``, a file of other seeds or of other code, or not such a file.

    Source: none; plain bookkeeping.
    """

    def __init__(self, path: str | Path, *, seeds: Sequence[int], resume: bool) -> None:
        self.path, self.claims = Path(path), dict[str, Mapping[str, object]]()
        self.context = {"seeds": list(seeds), "turnout": __version__, "code": code()}
        self.context |= {"torch": torch.__version__, "python": platform.python_version()}
        if resume and self.path.exists():
            self.claims = self._kept()

    def _kept(self) -> dict[str, Mapping[str, object]]:
        there = read_json(self.path, refuse=self._refused, any_link=True)
        differs = [name for name, value in self.context.items() if there.get(name) != value]
        claims = there.get("claims")
        if not isinstance(claims, list) or not all(isinstance(claim, dict) and "name" in claim for claim in claims):
            raise self._refused("no list of claims")
        if differs:
            raise self._refused(f"one that differs in {', '.join(differs)}")
        return {str(claim["name"]): claim for claim in claims}

    def _refused(self, what: str) -> UsageError:
        allowed, fix = "hold results of these seeds and this code", "leave --resume out to measure all again"
        return UsageError(word(f"the file {self.path}", got=what, allowed=allowed, where=_WHERE, fix=fix))

    def add(self, result: Result, order: Sequence[str]) -> None:
        """Keeps a result, claims in this order."""
        self.claims[result.claim.name] = result.to_json_dict()
        claims = [self.claims[name] for name in order if name in self.claims]
        write_whole(self.path, json.dumps({"format": 2, **self.context, "claims": claims}, indent=2) + "\n")


def code() -> str:
    """A hash of the sources of turnout: the same code gives the same numbers."""
    found, root = hashlib.sha256(), Path(__file__).parent.parent
    for path in sorted(root.rglob("*.py")):
        found.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def measured(claims: Sequence[Claim], *, seeds: Sequence[int], jobs: int = 1, note: Note = None) -> Iterator[Result]:
    """The claims' results in their order, each as soon as it and those before it are there; one thread a process.

    ``note`` is told a line after each seed, with the time left. Several jobs give the same numbers as one.

    Source: none; plain bookkeeping.
    """
    torch.set_num_threads(1)
    tasks = [(claim, seed) for claim in claims for seed in seeds]
    if jobs == 1:
        yield from _gathered(tasks, (_timed(claim.name, seed) for claim, seed in tasks), seeds, 1, note)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting = [pool.submit(_timed, claim.name, seed) for claim, seed in tasks]
        try:
            yield from _gathered(tasks, (each.result() for each in waiting), seeds, jobs, note)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _gathered(
    tasks: Sequence[tuple[Claim, int]],
    done: Iterable[tuple[Values, float]],
    seeds: Sequence[int],
    jobs: int,
    note: Note,
) -> Iterator[Result]:
    began, foreseen, passed = time.perf_counter(), sum(claim.seconds for claim, _ in tasks), 0.0
    rows: list[tuple[Values, float]] = []
    for (claim, seed), (values, seconds) in zip(tasks, done, strict=True):
        passed += claim.seconds
        if note:
            pace = max((time.perf_counter() - began) / passed, 0.1 / jobs)
            left = f"about {pace * (foreseen - passed) / 60:.0f} min left"
            note(f"{claim.name}, seed {seed} ({left}): " + "; ".join(f"{k} {v:.4g}" for k, v in values.items()))
        rows.append((values, seconds))
        if len(rows) == len(seeds):
            yield Result(claim, tuple(seeds), tuple(each for each, _ in rows), sum(each for _, each in rows))
            rows = []


def _timed(name: str, seed: int) -> tuple[Values, float]:
    from turnout import claims

    torch.set_num_threads(1)
    find: Callable[[str], Callable[[], Claim]] = claims.find
    began = time.process_time()
    return find(name)().measure_one(seed), time.process_time() - began
