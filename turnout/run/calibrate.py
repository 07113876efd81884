"""Measures on this machine what its executors choose by, and keeps it for ``turnout.run.tuned`` to read."""

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from turnout.errors import TurnoutError
from turnout.run.choose import EXECUTORS, features
from turnout.run.kernel_choice import Shape, choose_kernels, clock, layer
from turnout.run.shipped import shipped
from turnout.run.tuned import as_tuned, forget, kept, tuning_path
from turnout.storage import write_whole
from turnout.types.processor import processor
from turnout.types.tuning import Tuning

__all__ = ["calibrate"]

# Tokens (more than turnout.run.decode takes), width, experts, experts per token, hidden width.
_SHAPES: Sequence[Shape] = (
    (24, 256, 8, 2, 256),
    (24, 256, 64, 8, 64),
    (32, 512, 64, 8, 128),
    (64, 256, 8, 2, 512),
    (256, 256, 64, 8, 64),
    (512, 128, 64, 8, 64),
    (512, 256, 8, 2, 256),
    (1024, 256, 64, 8, 128),
    (2048, 256, 8, 2, 256),
)
_PATIENCE_S = 0.2


def calibrate(
    *,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    shapes: Sequence[Shape] = _SHAPES,
    kernels: bool = True,
    path: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Tuning:
    """Measures what the executors choose by on this machine, and keeps it beside what other machines measured.

    Takes about half a minute with the given shapes on one thread. The machine should have nothing else to do. Nothing
    is written before all is measured, so it may be stopped at any time.

    Args:
        device: the device to measure.
        dtypes: the dtypes to measure.
        shapes: (T, D, E, K, F) of every measurement of the executors' costs; at least four.
        kernels: also measure which kernels, groups and row counts the CPU is fastest with.
        path: where to keep it, by default the file that ``turnout.run.tuned`` reads.
        say: is told what is measured now.

    Returns:
        What was measured, which holds from the next process on, and in this one.

    Raises:
        StorageError: the file cannot be written.

    >>> import tempfile
    >>> shapes = [(4, 8, 2, 1, 8), (8, 16, 2, 1, 8), (16, 8, 4, 2, 8), (32, 16, 4, 2, 8)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     calibrate(dtypes=(torch.float32,), shapes=shapes, kernels=False, path=Path(folder) / "a.json").origin
    'measured'

    Source: none; the fastest of candidates, and ordinary non-negative least squares of relative error.
    """
    path = tuning_path() if path is None else path
    usual = dataclasses.replace(shipped(processor(), torch.get_num_threads()), origin="measured")
    tuning = choose_kernels(usual, say) if kernels else usual
    seconds = dict(tuning.seconds)
    for dtype in dtypes:
        for train in (False, True):
            named = f"{torch.device(device).type} {str(dtype).removeprefix('torch.')}"
            situation = f"{named} {'training' if train else 'forward'}"
            say(f"costs, {situation}")
            rows, times = [], {name: [] for name in EXECUTORS if name != "reference"}
            with as_tuned(tuning):
                for T, D, E, K, F in shapes:
                    rows.append(features(T * K, E, D, F, gated=True))
                    for name, value in _measure((T, D, E, K, F), dtype, device, train, list(times)).items():
                        times[name].append(value)
            seconds[situation] = {name: tuple(_fit(rows, values)) for name, values in times.items()}
    tuning = dataclasses.replace(tuning, seconds=seconds)
    _keep(tuning, path)
    return tuning


def _keep(tuning: Tuning, path: Path) -> None:
    """Writes it among what the file holds of other machines, versions and threads; a broken file is replaced."""
    try:
        known = kept(path)
    except (OSError, TurnoutError):
        known = {}
    here = (tuning.processor, tuning.torch, tuning.threads)
    every = [*(one for key, one in known.items() if key != here), tuning]
    write_whole(path, json.dumps({"tunings": [one.to_json_dict() for one in every]}, indent=1) + "\n")
    forget()


def _measure(shape: Shape, dtype: torch.dtype, device: str, train: bool, names: list[str]) -> dict[str, float]:
    """Seconds of each executor, their turns interleaved and a new decision at every turn."""
    run = layer(shape, dtype, device, train)
    taken: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    while len(taken[names[0]]) < 3 or (time.perf_counter() - begin < _PATIENCE_S and len(taken[names[0]]) < 30):
        for name in names:
            start = clock()
            run(EXECUTORS[name])
            taken[name].append(clock() - start)
    # The least is the time without what else the machine was doing.
    return {name: min(values[1:]) for name, values in taken.items()}


def _fit(rows: list[tuple[float, ...]], values: list[float]) -> list[float]:
    """Non-negative coefficients with the least relative error: features that come out negative leave, one by one."""
    target = torch.tensor(values, dtype=torch.float64)
    scale = torch.tensor(rows, dtype=torch.float64) / target[:, None]
    unit = scale.norm(dim=0).clamp_min(1e-30)
    kept = list(range(scale.shape[1]))
    found = torch.zeros(scale.shape[1], dtype=torch.float64)
    while kept:
        part = torch.linalg.lstsq((scale / unit)[:, kept], torch.ones(len(values), 1, dtype=torch.float64)).solution[
            :, 0
        ]
        if bool((part >= 0).all()):
            found[kept] = part / unit[kept]
            break
        kept.pop(int(part.argmin()))
    return [float(f"{value:.3g}") for value in found]
