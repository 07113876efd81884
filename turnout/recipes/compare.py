"""The demo: a dense and a sparse model of equal active FLOPs, the same text, one table and one page."""

import dataclasses
import json
from pathlib import Path

from turnout.recipes.execute import Done, execute
from turnout.recipes.inspect import write_report
from turnout.recipes.tiny import tiny, tiny_dense
from turnout.storage import write_whole


def demo(out: str | Path, *, steps: int | None = None, quiet: bool = False, device: str | None = None) -> Done:
    """Trains ``tiny_dense`` and ``tiny`` on the text that this Python carries and compares them.

    Args:
        out: the output folder; ``dense`` and ``moe`` run folders, ``table.json`` and ``report.html`` go into it.
            A demo that was interrupted there goes on where it stopped.
        steps: optimiser steps of each model; default the recipes' own, at most six minutes on two cores.
        quiet: no progress on stderr.
        device: where to train; None as the recipes say, on CUDA where it is there, else on the CPU.

    Returns:
        Both folders, their numbers and the page.

    Source: Fedus et al., 2021, "Switch Transformers", for the comparison at equal active FLOPs.
    """
    out = Path(out)
    finished = []
    for name, recipe in (("dense", tiny_dense), ("moe", tiny)):
        run = recipe()
        if steps is not None:
            train = dataclasses.replace(run.train, steps=steps, warmup=min(run.train.warmup, max(1, steps // 10)))
            run = dataclasses.replace(run, train=train)
        folder = out / name
        resume = "latest" if (folder / "run.json").exists() else None
        finished.append(execute(run, folder, resume=resume, tokens_folder=out / "tokens", quiet=quiet, device=device))
    done = Done(
        tuple(folder for one in finished for folder in one.folders),
        tuple(run for one in finished for run in one.runs),
        write_report([folder for one in finished for folder in one.folders], out / "report.html"),
    )
    write_whole(out / "table.json", json.dumps(done.rows(), indent=2) + "\n")
    return done
