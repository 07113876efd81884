"""What turnout's own pieces take over torch's: activations, sums, products, attention, and weights in few bits.

    python -m benchmarks.pieces [--rounds 9] [--out benchmarks/results]

Each is turnout's way and another, in turn in one process, CPU time of the thread, medians; values are compared first.
A step of training is timed with its products turnout's own and with torch's. Experts in few bits are multiplied from
their codes, and from panels of weights that are written out.
"""

import argparse
import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.few_rows import Shape, evenly, stack
from benchmarks.tables import heading, provenance, write
from turnout.run import packed_experts, sort
from turnout.run.compiled import why_not_compiled
from turnout.run.compiled.attention import looks
from turnout.run.compiled.gates import activated, activation_slopes
from turnout.run.compiled.sums import add_rows
from turnout.run.kernel_choice import layer
from turnout.run.product import linear
from turnout.run.tuned import as_tuned, tuning
from turnout.types import PackedWeights

ROWS = (4, 8, 16, 32, 64, 128)
SHAPES = ((2048, 512, 128, 6, 128), (1000, 512, 32, 4, 512), (512, 512, 64, 8, 256), (64, 512, 64, 8, 256))
Way = Callable[[], object]


def compared(ours: Way, other: Way, rounds: int) -> tuple[float, float]:
    """Milliseconds of both."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(-2, rounds):
        for way, found in zip((ours, other), times, strict=True):
            start = time.thread_time()
            way()
            if turn >= 0:
                found.append(1e3 * (time.thread_time() - start))
    return statistics.median(times[0]), statistics.median(times[1])


def same(ours: Tensor, other: Tensor, off: float = 1e-5) -> None:
    """Raises where they are not: no times for wrong answers."""
    if not float((ours - other).norm() / other.norm()) < off:
        raise SystemExit("no times for wrong answers")


def pieces(rounds: int) -> dict[str, tuple[float, float]]:
    """Of 1024 rows in fp32: activation (F 128), its gradients, and sums of rows of 512 into half as many tokens."""
    g = torch.Generator().manual_seed(0)
    hidden_NH, grad_NF = torch.randn(1024, 256, generator=g), torch.randn(1024, 128, generator=g)
    weight_N, made_NF, slope_NH, of_N = (
        torch.rand(1024, generator=g),
        grad_NF.clone(),
        hidden_NH.clone(),
        torch.empty(1024),
    )
    gate_NF, value_NF = hidden_NH.chunk(2, 1)

    def forward() -> Tensor:
        return functional.silu(gate_NF) * value_NF

    def backward() -> tuple[Tensor, ...]:
        a_NF, wide_NF = functional.silu(gate_NF), grad_NF * weight_N[:, None]
        slopes = torch.ops.aten.silu_backward(wide_NF * value_NF, gate_NF), wide_NF * a_NF
        return a_NF * value_NF * weight_N[:, None], torch.cat(slopes, 1), (grad_NF * (a_NF * value_NF)).sum(1)

    row_ND, order_N = torch.randn(1024, 512, generator=g), torch.randperm(1024, generator=g)
    token_M, start_T, into_TD = torch.arange(1024) // 2, torch.arange(0, 1024, 2), torch.empty(512, 512)

    def sums() -> Tensor:
        return functional.embedding_bag(order_N, row_ND, start_T, mode="sum", per_sample_weights=weight_N)

    ours: dict[str, tuple[Way, Way]] = {
        "activation": (lambda: activated(hidden_NH, "swiglu", made_NF), forward),
        "its gradients": (
            lambda: activation_slopes("swiglu", hidden_NH, grad_NF, weight_N, made_NF, slope_NH, of_N), backward
        ),
        "sums of rows": (lambda: add_rows(row_ND, token_M, into_TD.zero_(), place_M=order_N, weight_M=weight_N), sums),
    }  # fmt: skip
    for way, _ in ours.values():
        way()
    same(slope_NH, backward()[1])
    same(into_TD, sums())
    return {name: compared(*ways, rounds) for name, ways in ours.items()}


def products(rounds: int) -> dict[str, tuple[float, float]]:
    """A step of training with its products turnout's own, and torch's."""
    found, here = {}, tuning()
    for dtype in (torch.float32, torch.bfloat16):
        for shape in SHAPES:
            run = layer(shape, dtype, "cpu", True)

            def by(rows: int, run: Callable[..., object] = run) -> None:
                with as_tuned(dataclasses.replace(here, tiled_rows=rows, tiled_rows_short=rows)):
                    run(sort)

            name = f"{'fp32' if dtype == torch.float32 else 'bf16'} {','.join(map(str, shape))}"
            found[name] = compared(lambda by=by: by(1024), lambda by=by: by(0), rounds)
    return found


def prompts(rounds: int) -> dict[str, tuple[float, float]]:
    """Of 512 tokens in one text: a dense map, and attention of 8 heads of 64 with 4 of keys; and torch's."""
    found, g = {}, torch.Generator().manual_seed(0)
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        x_TD, weight_OD = torch.randn(512, 512, generator=g).to(dtype), torch.randn(1024, 512, generator=g).to(dtype)
        q, k, v = (torch.randn(1, heads, 512, 64, generator=g).to(dtype) for heads in (8, 4, 4))

        def by_torch(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return y.transpose(1, 2).flatten(2)

        ways: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
            "a map of 512 to 1024": (
                lambda x=x_TD, w=weight_OD: linear(x, w), lambda x=x_TD, w=weight_OD: functional.linear(x, w)
            ),
            "attention": (lambda q=q, k=k, v=v: looks(q, k, v, scale=64**-0.5), by_torch),
        }  # fmt: skip
        for what, pair in ways.items():
            same(*(way().float() for way in pair), off=1e-5 if name == "fp32" else 1e-2)
            found[f"{what}, {name}"] = compared(*pair, rounds)
    return found


def few_bits(form: str, dtype: torch.dtype, rounds: int) -> dict[int, tuple[float, float]]:
    """Experts of so many rows each from their codes, and from panels."""
    shape, g, here = Shape(), torch.Generator().manual_seed(0), tuning()
    sizes = (shape.experts, 2 * shape.hidden, shape.width), (shape.experts, shape.width, shape.hidden)
    weights, found = PackedWeights(*(stack(form, size, g) for size in sizes)), {}
    for rows in ROWS:
        routing = evenly(rows, shape)
        x_TD = torch.randn(routing.num_tokens, shape.width, generator=g).to(dtype)

        def by(limit: int, x: Tensor = x_TD, routing=routing) -> Tensor:
            with torch.no_grad(), as_tuned(dataclasses.replace(here, panel_rows=limit, panel_rows_short=limit)):
                return packed_experts(x, routing, weights)

        same(by(rows).float(), by(0).float(), off=1e-5 if dtype == torch.float32 else 2e-2)
        found[rows] = compared(lambda by=by, n=rows: by(n), lambda by=by: by(0), rounds)
    return found


def table(head: str, found: dict[str, tuple[float, float]]) -> list[str]:
    """Both in milliseconds, and their ratio."""
    lines = ["", f"| {head} | turnout's, ms | the other, ms | ratio |", "|---|---|---|---|"]
    return lines + [f"| {name} | {a:.3f} | {b:.3f} | {a / b:.2f} |" for name, (a, b) in found.items()]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    if (why := why_not_compiled()) is not None:
        raise SystemExit(why)
    torch.set_num_threads(1)
    about, rounds = provenance(), options.rounds
    found = {"1024 rows, fp32, over torch's calls": pieces(rounds)}
    found["forward+backward, products our own over torch's"] = products(rounds)
    found["512 tokens of a prompt, over torch's calls"] = prompts(rounds)
    for form, (dtype, name) in itertools.product(
        ("int8 a row", "int4 of 64"), ((torch.float32, "fp32"), (torch.bfloat16, "bf16"))
    ):
        rows = {f"{n} rows each": times for n, times in few_bits(form, dtype, rounds).items()}
        found[f"{form}, {name}, from codes over panels"] = rows
    lines = [*heading("Pieces of the expert layer", about)]
    for head, times in found.items():
        lines += table(head, times)
    print("\n".join(lines))
    write(options.out, "pieces", lines, {**about, "found": found})


if __name__ == "__main__":
    main()
