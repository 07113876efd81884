"""Measures which kernels, groups and row counts are fastest on this machine: everything of a tuning but its costs."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from turnout.run.compiled import compiled_here
from turnout.run.compiled.dots import able
from turnout.run.compiled.rows import MOST_ROWS
from turnout.run.packed import packed_experts
from turnout.run.product import product
from turnout.run.shipped import has_onednn
from turnout.run.sort import sort
from turnout.run.tuned import as_tuned
from turnout.types import ExpertWeights, Packed, PackedWeights, Routing
from turnout.types.tuning import Tuning

__all__ = ["Shape", "choose_kernels", "clock", "layer"]

_T = TypeVar("_T")
Shape = tuple[int, int, int, int, int]
# Rows, in and out of the products that are timed, from 2^20 to 2^30 multiply-adds, four times as many at each step.
_PRODUCTS = ((32, 128, 256), (64, 256, 256), (128, 256, 512), (256, 512, 512), (1024, 512, 512), (1024, 1024, 1024))
# oneDNN must be faster by this factor: it compiles for every new row count, and counts are rounded up for it.
_CLEAR = 1.15
# A choice moves away from the shipped one only if it is faster by this factor; below that, noise would decide.
_BETTER = 1.05
_GROUPS = (1 << 15, 1 << 17, 1 << 19)
_STEPS = ((16, 32), (8, 16), (64, 128))
_CALLS = (3_000_000, 0, 12_000_000)
_ROWS = (1, 2, 4, 8, 16)
# Rows for each expert that these limits are measured at.
_TILED, _PACKED = (16, 64, 256, 512, 1024), (1, 2, 4, 8, 16, 32, 64)
# On which layer each is measured.
_LAYERS: dict[str, Shape] = {
    "group": (1024, 256, 64, 6, 64),
    "steps": (1024, 256, 32, 4, 256),
    "call": (512, 256, 64, 8, 64),
}


def clock() -> float:
    """Seconds: of this thread where it works alone, for others may use the machine, else of the wall."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def least(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """The least seconds of each, their turns interleaved, after one turn that does not count."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds + 1):
        for seconds, run in zip(taken, runs, strict=True):
            start = clock()
            run()
            seconds.append(clock() - start)
    return [min(seconds[1:]) for seconds in taken]


def layer(
    shape: Shape, dtype: torch.dtype, device: str, train: bool, *, tables: bool = False
) -> Callable[[Callable[..., Tensor]], object]:
    """A layer with random weights: what runs an executor on it, with a new decision at every call.

    Weights lie (out, in), as those of banks and of transformers, or with ``tables`` (in, out).
    """
    T, D, E, K, F = shape
    g = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return (torch.randn(sizes, generator=g) * 0.1).to(device, dtype).requires_grad_(train)

    x_TD, grad_TD = normal(T, D), torch.randn(T, D, generator=g).to(device, dtype)
    if tables:
        weights = ExpertWeights(normal(E, D, 2 * F), normal(E, F, D))
    else:
        weights = ExpertWeights(normal(E, 2 * F, D).transpose(1, 2), normal(E, D, F).transpose(1, 2))

    def run(executor: Callable[..., Tensor]) -> None:
        weight_TK, index_TK = torch.rand(T, E, generator=g).to(device).topk(K)
        with torch.set_grad_enabled(train):
            y_TD = executor(x_TD, Routing.from_topk(index_TK, weight_TK, num_experts=E), weights)
        if train:
            y_TD.backward(grad_TD)
        if y_TD.is_cuda:
            torch.cuda.synchronize(y_TD.device)

    return run


def choose_kernels(tuning: Tuning, say: Callable[[str], None]) -> Tuning:
    """The tuning with everything measured but ``seconds``, in about twenty seconds on one thread.

    Args:
        tuning: what is shipped for this machine; a choice moves away from it where that is clearly faster.
        say: is told what is measured now.

    Source: none; the fastest of a few candidates.
    """
    if has_onednn():
        say("fp32 products")
        tuning = dataclasses.replace(tuning, onednn=_onednn_from(tuning, turned=False))
        say("fp32 products, transposed")
        tuning = dataclasses.replace(tuning, onednn_turned=_onednn_from(tuning, turned=True))
    say("how many rows at once")
    # For torch's products: with turnout's own all experts are one call (turnout.run.compiled.passes).
    bare = dataclasses.replace(tuning, tiled_rows=0, tiled_rows_short=0)
    groups = [dataclasses.replace(bare, group=group) for group in _first(tuning.group, _GROUPS)]
    bare = _fastest(groups, _LAYERS["group"], torch.float32)
    say("row counts in 16 bits")
    counts = [
        dataclasses.replace(bare, steps=one, steps_near=near)
        for one, near in _first((tuning.steps, tuning.steps_near), _STEPS)
    ]
    bare = _fastest(counts, _LAYERS["steps"], torch.bfloat16)
    say("experts that share a call")
    calls = [dataclasses.replace(bare, call=call) for call in _first(tuning.call, _CALLS)]
    bare = _fastest(calls, _LAYERS["call"], torch.bfloat16)
    tuning = dataclasses.replace(tuning, group=bare.group, steps=bare.steps, steps_near=bare.steps_near, call=bare.call)
    say("few tokens")
    tuning = dataclasses.replace(tuning, decode_rows=_few_rows(tuning, "decode_rows", tables=True))
    if not compiled_here():
        return tuning
    say("compiled products")
    tuning = dataclasses.replace(tuning, tiled_rows=_tiled_rows(tuning, "tiled_rows", torch.float32))
    short = _tiled_rows(tuning, "tiled_rows_short", torch.bfloat16)
    tuning = dataclasses.replace(tuning, tiled_rows_short=short)
    tuning = dataclasses.replace(tuning, compiled_rows=_few_rows(tuning, "compiled_rows", tables=False))
    say("few bits")
    if not able(torch.bfloat16):
        return dataclasses.replace(tuning, packed_rows=_packed_rows(tuning, "packed_rows", torch.float32))
    tuning = dataclasses.replace(tuning, panel_rows=_packed_rows(tuning, "panel_rows", torch.float32))
    return dataclasses.replace(tuning, panel_rows_short=_packed_rows(tuning, "panel_rows_short", torch.bfloat16))


def _first(usual: _T, others: Sequence[_T]) -> list[_T]:
    return [usual, *(other for other in others if other != usual)]


def _onednn_from(tuning: Tuning, *, turned: bool) -> int | None:
    """The least multiply-adds from which oneDNN is clearly faster at every size measured, and None for nowhere."""
    found = None
    g = torch.Generator().manual_seed(0)
    for M, K, N in reversed(_PRODUCTS):
        a = torch.randn(K, M, generator=g).t() if turned else torch.randn(M, K, generator=g)
        b, out = torch.randn(K, N, generator=g), torch.empty(M, N)
        times = min(32, 1 + (1 << 25) // (M * K * N))

        def by(limit: int | None, a: Tensor = a, b: Tensor = b, out: Tensor = out, n: int = times) -> None:
            with as_tuned(dataclasses.replace(tuning, onednn=limit, onednn_turned=limit)):
                for _ in range(n):
                    product(a, b, out_MN=out)

        mkl, onednn = least([lambda by=by: by(None), lambda by=by: by(0)], 5)
        if mkl < _CLEAR * onednn:
            break
        found = M * K * N
    return found


def _fastest(candidates: Sequence[Tuning], shape: Shape, dtype: torch.dtype) -> Tuning:
    """The first candidate, or another by which a step of training that layer is clearly faster."""
    run = layer(shape, dtype, "cpu", True)

    def by(tuning: Tuning) -> None:
        with as_tuned(tuning):
            run(sort)

    seconds = least([lambda one=one: by(one) for one in candidates], 6)
    best = min(range(len(candidates)), key=seconds.__getitem__)
    return candidates[best] if seconds[best] * _BETTER < seconds[0] else candidates[0]


def _few_rows(tuning: Tuning, field: str, *, tables: bool) -> int:
    """Up to how many rows for each expert weights are best read row by row, at few tokens; ``tables`` as ``layer``."""
    found, experts = 0, 8
    for rows in _ROWS:
        tokens = min(rows * experts // 2, tuning.decode_tokens if tables else MOST_ROWS)
        top_k = max(1, min(rows * experts // max(tokens, 1), experts))
        run = layer((tokens, 512, experts, top_k, 256), torch.float32, "cpu", False, tables=tables)
        if not _wins(run, tuning, field, rows):
            break
        found = rows
    return found


def _tiled_rows(tuning: Tuning, field: str, dtype: torch.dtype) -> int:
    """Up to how many rows for each expert, products of turnout's own make a step of training faster."""
    found, experts = 0, 8
    for rows in _TILED:
        run = layer((rows * experts // 2, 256, experts, 2, 256), dtype, "cpu", True)
        if not _wins(run, tuning, field, rows):
            break
        found = rows
    return found


def _packed_rows(tuning: Tuning, field: str, dtype: torch.dtype) -> int:
    """Up to how many rows each experts in four bits are best read from their codes."""
    found, experts, width, hidden = 0, 8, 512, 256
    g = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Packed:
        code = torch.randint(-8, 8, shape, generator=g)
        return Packed.of(code, torch.full((*shape[:-1], shape[-1] // 32), 0.01), group=32, bits=4)

    weights = PackedWeights(some(experts, 2 * hidden, width), some(experts, width, hidden))
    for rows in _PACKED:
        x_TD = torch.randn(rows * experts // 2, width, generator=g).to(dtype)
        weight_TK, index_TK = torch.rand(rows * experts // 2, experts, generator=g).topk(2)
        routing = Routing.from_topk(index_TK, weight_TK, num_experts=experts)

        def run(_: object, x: Tensor = x_TD, routing: Routing = routing) -> None:
            with torch.no_grad():
                packed_experts(x, routing, weights)

        if not _wins(run, tuning, field, rows):
            break
        found = rows
    return found


def _wins(run: Callable[[Callable[..., Tensor]], object], tuning: Tuning, field: str, limit: int) -> bool:
    """Whether this limit is no slower than none at all on what it just lets in."""

    def by(value: int) -> None:
        with as_tuned(dataclasses.replace(tuning, **{field: value})):  # pyrefly: ignore[bad-argument-type]
            run(sort)

    there, never = least([lambda: by(limit), lambda: by(0)], 9)
    return there <= never
