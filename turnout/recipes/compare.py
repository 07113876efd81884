"""The demo: a dense and a sparse model of equal active FLOPs, the same text, one table and one page."""

import dataclasses
import json
import sys
from pathlib import Path

from turnout.recipes.execute import Done, execute
from turnout.recipes.inspect import write_report
from turnout.recipes.pace import estimate_s
from turnout.recipes.run import Run
from turnout.recipes.tiny import tiny, tiny_dense
from turnout.storage import write_whole

QUICK_STEPS = 60


def demo(out: str | Path, *, steps: int | None = None, quiet: bool = False, device: str | None = None) -> Done:
    """Trains ``tiny_dense`` and ``tiny`` on the text that this Python carries and compares them.

    Args:
        out: the output folder; ``dense`` and ``moe`` run folders, ``table.json`` and ``report.html`` go into it.
            A demo that was interrupted there goes on where it stopped.
        steps: optimiser steps of each model; default the recipes' own, a few minutes on two cores.
        quiet: no progress on stderr, and no word about how long it will take.
        device: where to train; None as the recipes say, on CUDA where it is there, else on the CPU.

    Returns:
        Both folders, their numbers and the page.

    Source: Fedus et al., 2021, "Switch Transformers", for the comparison at equal active FLOPs.
    """
    out = Path(out)
    runs = {"dense": _of(tiny_dense(), steps, device), "moe": _of(tiny(), steps, device)}
    begun = [name for name in runs if (out / name / "run.json").exists()]
    if not quiet and not begun:
        seconds = {name: estimate_s(run) for name, run in runs.items()}
        each = ", ".join(f"{name} {took / 60:.1f}" for name, took in seconds.items())
        total = max(1, round(sum(seconds.values()) / 60 + 0.3))  # the text takes its part
        print(f"about {total} minute{'s' if total > 1 else ''} on this machine ({each})", file=sys.stderr)
    finished = []
    for name, run in runs.items():
        resume = "latest" if name in begun else None
        finished.append(execute(run, out / name, resume=resume, tokens_folder=out / "tokens", quiet=quiet))
    done = Done(
        tuple(folder for one in finished for folder in one.folders),
        tuple(run for one in finished for run in one.runs),
        write_report([folder for one in finished for folder in one.folders], out / "report.html"),
    )
    write_whole(out / "table.json", json.dumps(done.rows(), indent=2) + "\n")
    return done


def _of(run: Run, steps: int | None, device: str | None) -> Run:
    """The run over so many steps, a tenth of them to warm up, on this device."""
    run = dataclasses.replace(run, train=dataclasses.replace(run.train, device=device or run.train.device))
    if steps is None:
        return run
    train = dataclasses.replace(run.train, steps=steps, warmup=min(run.train.warmup, max(1, steps // 10)))
    return dataclasses.replace(run, train=train)
