"""Kills a rank of a run again and again, and counts how often torchrun brings the run back.

    python -m benchmarks.restarts --kills 10 --ranks 4 --out FOLDER

``torchrun --max-restarts`` trains a small model on gloo. Each time that the run has gone a few steps since it last
began, one of its ranks, another each time, is ended with SIGKILL. A restart counts when training goes on after it. In
the end the metrics are held against those of a run that nobody disturbed: every loss, bit for bit.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_SIZES = ("width=32", "layers=2", "heads=2", "kv_heads=1", "vocab_size=512", "seq=32", "max_seq=64", "batch=8")
_SIZES += (
    "num_experts=4",
    "moe.hidden=32",
    "eval_tokens=512",
    "log_every=1",
    "checkpoint_every=2",
    "eval_every=1000",
    "held_out=0.3",
)
_STEPS = 3  # at least so many between two kills
_CLOCKED = ("tokens_per_s", "seconds", "peak_memory_bytes")


def restarts(out: Path, text: Path, *, kills: int, ranks: int, layout: str, wait_s: float = 600.0) -> dict[str, Any]:
    """How many of the kills the run came back from, how long each took, and whether it ended as if nothing had been.

    A restart's seconds go from the kill until the run is further than it was.

    Args:
        out: a new folder.
        text: a file or folder to train on.
        kills: how many.
        ranks: processes.
        layout: of the run, as ``turnout train --layout`` takes it.
        wait_s: after that long without a step a restart has failed.
    """
    steps = (_STEPS + 5) * kills + 8
    _end(_begin(out / "whole", out, text, ranks, layout, steps, 0), wait_s)
    run = _begin(out / "killed", out, text, ranks, layout, steps, kills)
    took, at = list[float](), 0
    for kill in range(kills):
        if not _until(out / "killed", run, at + _STEPS, wait_s):
            break
        victims, at, killed = _children(run.pid), _step(out / "killed"), time.monotonic()
        os.kill(victims[kill % len(victims)], signal.SIGKILL)
        if not _until(out / "killed", run, at + 2, wait_s):  # the step that was under way may still be told
            break
        took.append(time.monotonic() - killed)
    code = _end(run, wait_s)
    told = _exact(out / "whole")
    same = len(told) > steps and told == _exact(out / "killed")  # a line a step, and an evaluation
    spent = {"restart_s": [round(each, 1) for each in took]}
    return {"kills": kills, "recovered": len(took), "exit_code": code, "losses_equal": same, "steps": steps, **spent}


def _begin(
    run: Path, out: Path, text: Path, ranks: int, layout: str, steps: int, restarts: int
) -> subprocess.Popen[bytes]:
    run.parent.mkdir(parents=True, exist_ok=True)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
    turnout = ["-m", "turnout", "train", "tiny", *_SIZES, f"steps={steps}", "--data", str(text), "--out", str(run)]
    rest = ["--tokens", str(out / "tokens"), "--layout", layout, "--timeout", "120", "--quiet"]
    command = [*torchrun, "--max-restarts", str(restarts), *turnout, *rest]
    with run.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})


def _children(pid: int) -> list[int]:
    """The ranks: the processes that torchrun has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _step(run: Path) -> int:
    """The last step that metrics.jsonl tells of."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"])
    return 0


def _until(run: Path, process: subprocess.Popen[bytes], step: int, wait_s: float) -> bool:
    """Waits for this step; whether it came."""
    until = time.monotonic() + wait_s
    while time.monotonic() < until and process.poll() is None:
        if _step(run) >= step and (run / "checkpoints").is_dir():
            return True
        time.sleep(0.05)
    return False


def _lines(run: Path) -> list[dict[str, Any]]:
    found = []
    with contextlib.suppress(OSError, ValueError):
        for line in (run / "metrics.jsonl").read_text().splitlines():
            found.append(json.loads(line))
    return found


def _exact(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock decides."""
    return [{name: value for name, value in line.items() if name not in _CLOCKED} for line in _lines(run)]


def _end(process: subprocess.Popen[bytes], wait_s: float) -> int | None:
    try:
        return process.wait(timeout=wait_s)
    except subprocess.TimeoutExpired:
        process.terminate()
        return None


def main() -> int:
    """Prints the result as JSON; exit code 1 when a restart failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text", type=Path, default=Path(__file__).parents[1] / "turnout" / "claims")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--layout", default="dp_shard=4,ep=2")
    given = parser.parse_args()
    found = restarts(given.out, given.text, kills=given.kills, ranks=given.ranks, layout=given.layout)
    print(json.dumps(found))
    return 0 if found["recovered"] == given.kills and found["losses_equal"] and found["exit_code"] == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
