"""Experts for few rows, compiled, over a plain sweep of the same bytes.

    python -m benchmarks.few_rows --rounds 9 --out benchmarks/results

Every expert of a bank has M rows; the time is the whole layer's (gather, gate and up, activation, down, weighted sum),
without a gradient. A sweep adds up the same bytes, compiled too: floats as floats, codes as whole numbers. Both are
timed in turn in one process, in processor time of the thread, and compared by the medians of the rounds. The banks of a
format take more than the last cache holds, and lie in large pages where the system gives them, as models that are read
from a folder do. What torch's own path takes is beside it where there is one.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.tables import heading, provenance, write
from turnout.run import packed_reference, sort
from turnout.run.compiled import why_not_compiled
from turnout.run.compiled.engine import array, kernel
from turnout.run.compiled.experts import experts_times
from turnout.run.pages import in_large_pages
from turnout.types import ExpertWeights, Packed, PackedWeights, Routing

ROWS = (1, 2, 4)
# By format: what M = 1, 2 and 4 may take over the sweep. For bits there is one bar.
BARS = {"fp32": (1.10, 1.15, 1.30), "bf16": (1.25, 1.30, 1.50), "fp16": (None,) * 3}
_FEW = ("int8 a row", "int8 of 64", "int4 of 64", "MXFP4")
BARS |= {f"{form}{rows}": (1.60,) * 3 for form in _FEW for rows in ("", ", bf16 rows")}
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_BYTES = 96 << 20


@kernel()
def sweep(array_N):
    """The sum of all of it."""
    total = array_N[0] - array_N[0]
    for i in range(array_N.shape[0]):
        total += array_N[i]
    return total


@dataclasses.dataclass(frozen=True)
class Shape:
    """Experts, chosen ones a token, width and hidden."""

    experts: int = 32
    top_k: int = 4
    width: int = 512
    hidden: int = 512


Stack = Tensor | Packed


def stack(form: str, shape: tuple[int, int, int], generator: torch.Generator) -> Stack:
    """A stack of random matrices (E, O, I)."""
    if form in _DTYPES:
        return (torch.randn(shape, generator=generator) * shape[-1] ** -0.5).to(_DTYPES[form])
    experts, outs, ins = shape
    bits = 8 if form.startswith("int8") else 4
    group = ins if form.startswith("int8 a row") else min(32 if form.startswith("MX") else 64, ins)
    size = (experts, outs, ins * bits // 8)
    code = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    scale = torch.rand(experts, outs, ins // group, generator=generator) * ins**-0.5 * 2.0**-bits
    if form.startswith("MX"):
        half = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        power = scale.log2().round().exp2().bfloat16()
        return Packed(code, power, group, bits, torch.cat((half, -half)))
    return Packed(code if bits == 4 else code.view(torch.int8), scale, group, bits)


def swept(one: Stack) -> np.ndarray:
    """The bytes of a stack as the sweep reads them."""
    code = one if isinstance(one, Tensor) else one.code
    flat = code.reshape(-1)
    return array(flat) if flat.dtype == torch.float32 else array(flat.view(torch.int64))


def settled(banks: list[list[Stack]]) -> list[list[Stack]]:
    """The same in memory that was asked for in large pages before anything was written there."""
    held = [one if isinstance(one, Tensor) else one.code for bank in banks for one in bank]
    place = [torch.empty_like(one) for one in held]
    in_large_pages(place)
    moved = iter([new.copy_(one) for new, one in zip(place, held, strict=True)])
    return [
        [next(moved) if isinstance(one, Tensor) else dataclasses.replace(one, code=next(moved)) for one in bank]
        for bank in banks
    ]


def evenly(rows: int, shape: Shape) -> Routing:
    """Every expert has as many rows."""
    tokens = rows * shape.experts // shape.top_k
    index_TK = torch.arange(tokens * shape.top_k).reshape(tokens, shape.top_k) % shape.experts
    return Routing.from_topk(index_TK, torch.full(index_TK.shape, 1 / shape.top_k), num_experts=shape.experts)


def timed(call: Callable[[], object]) -> float:
    """Processor milliseconds of this thread."""
    start = time.thread_time()
    call()
    return (time.thread_time() - start) * 1e3


def measure(form: str, shape: Shape, rounds: int) -> dict[str, object]:
    """The medians of one format in milliseconds a bank, and their ratios."""
    generator = torch.Generator().manual_seed(100)
    sizes = (shape.experts, 2 * shape.hidden, shape.width), (shape.experts, shape.width, shape.hidden)
    one = [stack(form, size, generator) for size in sizes]
    each = sum(swept(part).nbytes for part in one)
    banks = settled([one, *([stack(form, size, generator) for size in sizes] for _ in range(1, -(-_BYTES // each)))])
    dtype = torch.bfloat16 if form.endswith("bf16 rows") else _DTYPES.get(form, torch.float32)
    calls: dict[str, Callable[[], object]] = {"sweep": lambda: [sweep(swept(p)) for bank in banks for p in bank]}
    for rows in ROWS:
        routing = evenly(rows, shape)
        x_TD = torch.randn(routing.num_tokens, shape.width, generator=generator).to(dtype)
        calls[f"M={rows}"] = lambda x=x_TD, r=routing: [experts_times(x, r, *bank) for bank in banks]
        if form in _DTYPES:
            weights = [ExpertWeights(up.mT.contiguous(), down.mT.contiguous()) for up, down in banks]
            calls[f"torch M={rows}"] = lambda x=x_TD, r=routing, w=weights: [sort(x, r, each) for each in w]
            check(experts_times(x_TD, routing, *banks[0]), sort(x_TD, routing, weights[0]))
        else:
            check(experts_times(x_TD, routing, *banks[0]), packed_reference(x_TD, routing, PackedWeights(*banks[0])))
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(timed(call) / len(banks))
    median = {name: statistics.median(values) for name, values in times.items()}
    speed = each / median["sweep"] / 1e6
    ratios = {name: value / median["sweep"] for name, value in median.items() if name != "sweep"}
    return {"format": form, "sweep_gb_s": speed, "ratios": ratios, "ms": times}


def check(got: Tensor, expected: Tensor) -> None:
    """Raises where the two are not the same layer: no times for wrong answers."""
    off = float((got.float() - expected.float()).norm() / expected.float().norm())
    if off > 2e-2:
        raise SystemExit(f"no times for wrong answers: off by {off:.1e}")


def page(found: list[dict[str, object]], shape: Shape) -> list[str]:
    """The table, with its bars."""
    size = f"{shape.experts} experts, width {shape.width}, hidden {shape.hidden}, top {shape.top_k}"
    lines = [f"{size}; every expert has M rows. Processor time of a layer over a sweep of its weights, medians.", ""]
    lines += ["| format | sweep GB/s | M = 1 (bar) | 2 (bar) | 4 (bar) | torch's path, (in, out): 1, 2, 4 |"]
    lines += ["|---|---|---|---|---|---|"]
    for one in found:
        form, ratios = one["format"], one["ratios"]
        cells = [
            f"{ratios[f'M={rows}']:.2f}" + (f" ({bar:.2f})" if bar else "")
            for rows, bar in zip(ROWS, BARS[form], strict=True)
        ]
        other = ", ".join(f"{ratios[f'torch M={rows}']:.2f}" for rows in ROWS) if form in _DTYPES else "-"
        lines.append(f"| {form} | {one['sweep_gb_s']:.1f} | {' | '.join(cells)} | {other} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--formats", nargs="*", default=list(BARS), choices=list(BARS))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if (why := why_not_compiled()) is not None:
        raise SystemExit(why)
    torch.set_num_threads(1)
    shape, about = Shape(), provenance()
    with torch.no_grad():
        found = [measure(form, shape, given.rounds) for form in given.formats]
    lines = [*heading("Experts for few rows, over a sweep of their weights", about), *page(found, shape)]
    print("\n".join(lines))
    write(given.out, "few_rows", lines, {**about, "found": found})


if __name__ == "__main__":
    main()
