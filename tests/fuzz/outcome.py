"""One try in a process that may hang, die, or want all memory: the folder is copied, harmed, read, and judged."""

import dataclasses
import json
import multiprocessing
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from tests.fuzz.harm import harm
from tests.fuzz.subjects import SUBJECTS, Subject
from turnout.errors import TurnoutError

BAD = ("traceback", "hang", "memory", "died", "escaped")
SECONDS, BYTES = 10, 3 << 30


class HangError(BaseException):
    """Raised by the alarm."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one try.

    Args:
        kind: of folder.
        number: of the try, which with the seed makes it again.
        file: that was harmed.
        way: "bytes", "json" or "header".
        what: "clear", "same", "other", "traceback", "hang", "memory", "died" or "escaped".
        said: the error, or what differs.
    """

    kind: str
    number: int
    file: str
    way: str
    what: str
    said: str


def _one(subject: Subject, kind: str, whole: Path, right: str, seed: int, number: int) -> Outcome:
    rng = random.Random(f"{seed} {kind} {number}")
    file = way = "?"
    with tempfile.TemporaryDirectory() as place:
        canary, folder, out = Path(place, "canary.safetensors"), Path(place, "in"), Path(place, "out")
        shutil.copytree(whole, folder)
        out.mkdir()
        safe = next(iter(sorted(whole.rglob("*.safetensors"))), None)
        canary.write_bytes(safe.read_bytes() if safe else b"canary")
        before = canary.read_bytes()
        try:
            file, way = harm(folder, rng, canary)
            signal.alarm(SECONDS)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = repr(subject.read(folder, out))
            what, said = ("same", "") if found == right else ("other", _difference(right, found))
        except TurnoutError as error:
            what, said = "clear", f"{type(error).__name__}: {error}"
        except HangError:
            what, said = "hang", traceback.format_exc(limit=-3)
        except MemoryError:
            what, said = "memory", traceback.format_exc(limit=-3)
        except RuntimeError as error:
            memory = "allocate memory" in str(error) or "bad_alloc" in str(error)
            what, said = "memory" if memory else "traceback", traceback.format_exc(limit=-4)
        except Exception:
            what, said = "traceback", traceback.format_exc(limit=-4)
        finally:
            signal.alarm(0)
        if canary.read_bytes() != before or {path.name for path in Path(place).iterdir()} != {canary.name, "in", "out"}:
            what, said = "escaped", f"something was written beside the folders; {said}"
    return Outcome(kind, number, file, way, what, said)


def _difference(right: str, found: str) -> str:
    at = next((n for n, (a, b) in enumerate(zip(right, found, strict=False)) if a != b), min(len(right), len(found)))
    return f"…{right[max(0, at - 60) : at + 30]}… is …{found[max(0, at - 60) : at + 30]}…"


def _work(pipe: Connection, kind: str, whole: Path, seed: int, numbers: range) -> None:
    def ring(*_: object) -> None:
        raise HangError

    signal.signal(signal.SIGALRM, ring)
    torch.set_num_threads(1)
    subject = SUBJECTS[kind]
    with tempfile.TemporaryDirectory() as out:
        right = repr(subject.read(whole, Path(out)))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, resource.RLIM_INFINITY))
    pipe.send(None)
    for number in numbers:
        pipe.send(_one(subject, kind, whole, right, seed, number))
    pipe.close()


def tries(kind: str, seed: int, numbers: range) -> list[Outcome]:
    """The outcomes of these tries of one kind, in their order."""
    found: list[Outcome] = []
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as place:
        whole = Path(place, "whole")
        SUBJECTS[kind].make(whole)
        while len(found) < len(numbers):
            mine, theirs = context.Pipe(duplex=False)
            left = numbers[len(found) :]
            worker = context.Process(target=_work, args=(theirs, kind, whole, seed, left), daemon=True)
            worker.start()
            theirs.close()
            before, what = len(found), "hang"
            try:
                mine.recv()
            except EOFError:
                raise AssertionError(f"a sound folder of the kind {kind!r} is not read") from None
            try:
                # The alarm is for what Python can stop; what it cannot is stopped from here.
                while len(found) < len(numbers) and mine.poll(3 * SECONDS):
                    found.append(mine.recv())
            except EOFError:
                what = "died"
            if len(found) < len(numbers):
                found.append(Outcome(kind, numbers[len(found)], "?", "?", what, f"after {len(found) - before} tries"))
            worker.kill()
            worker.join()
    return found


def as_json(outcome: Outcome) -> str:
    """One line, for a file of them."""
    return json.dumps(dataclasses.asdict(outcome))
