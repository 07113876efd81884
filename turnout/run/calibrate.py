"""Measures the executors on this machine, for ``choose``."""

import json
import time
from pathlib import Path

import torch
from torch import Tensor

from turnout.run.choose import EXECUTORS, _constants, constants_path, features
from turnout.storage import write_whole
from turnout.types import ExpertWeights, Routing

__all__ = ["calibrate"]

# Tokens (more than turnout.run.decode takes), width, experts, experts per token, hidden width.
_SHAPES = [
    (24, 256, 8, 2, 256),
    (24, 256, 64, 8, 64),
    (32, 512, 64, 8, 128),
    (64, 256, 8, 2, 512),
    (256, 256, 64, 8, 64),
    (512, 128, 64, 8, 64),
    (512, 256, 8, 2, 256),
    (1024, 256, 64, 8, 128),
    (2048, 256, 8, 2, 256),
]
_PATIENCE_S = 0.4


def calibrate(
    *,
    device: str = "cpu",
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16),
    shapes: list[tuple[int, int, int, int, int]] | None = None,
    path: Path | None = None,
) -> Path:
    """Measures the executors on this machine and keeps the constants of their cost, for ``choose`` to read.

    Takes about half a minute with the given shapes. The machine should have nothing else to do.

    Args:
        device: the device to measure.
        dtypes: the dtypes to measure.
        shapes: (T, D, E, K, F) of every measurement; at least four.
        path: where to keep them, by default the file that ``choose`` reads.

    Returns:
        The path.

    Raises:
        StorageError: the file cannot be written.

    >>> import tempfile
    >>> shapes = [(4, 8, 2, 1, 8), (8, 16, 2, 1, 8), (16, 8, 4, 2, 8), (32, 16, 4, 2, 8)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     calibrate(dtypes=(torch.float32,), shapes=shapes, path=Path(folder) / "constants.json").name
    'constants.json'

    Source: none; ordinary non-negative least squares of relative error.
    """
    seconds: dict[str, dict[str, list[float]]] = {}
    for dtype in dtypes:
        for train in (False, True):
            named = f"{torch.device(device).type} {str(dtype).removeprefix('torch.')}"
            situation = f"{named} {'training' if train else 'forward'}"
            rows, times = [], {name: [] for name in EXECUTORS if name != "reference"}
            for T, D, E, K, F in shapes or _SHAPES:
                rows.append(features(T * K, E, D, F, gated=True))
                for name, value in _measure(T, D, E, K, F, dtype, device, train, list(times)).items():
                    times[name].append(value)
            seconds[situation] = {name: _fit(rows, values) for name, values in times.items()}
    path = constants_path() if path is None else path
    kept = json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "seconds": seconds}, indent=1)
    write_whole(path, kept)
    _constants.cache_clear()
    return path


def _measure(
    T: int, D: int, E: int, K: int, F: int, dtype: torch.dtype, device: str, train: bool, names: list[str]
) -> dict[str, float]:
    """Seconds of each executor, their turns interleaved and a new decision at every turn."""
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=g) * 0.1).to(device, dtype).requires_grad_(train)

    x_TD, grad_TD = normal(T, D), torch.randn(T, D, generator=g).to(device, dtype)
    weights = ExpertWeights(normal(E, D, 2 * F), normal(E, F, D))
    taken: dict[str, list[float]] = {name: [] for name in names}
    begin = time.perf_counter()
    while len(taken[names[0]]) < 3 or (time.perf_counter() - begin < _PATIENCE_S and len(taken[names[0]]) < 30):
        weight_TK, index_TK = torch.rand(T, E, generator=g).to(device).topk(K)
        for name in names:
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                routing = Routing.from_topk(index_TK, weight_TK, num_experts=E)
                y_TD = EXECUTORS[name](x_TD, routing, weights)
            if train:
                y_TD.backward(grad_TD)
            if y_TD.is_cuda:
                torch.cuda.synchronize(y_TD.device)
            taken[name].append(time.perf_counter() - start)
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
