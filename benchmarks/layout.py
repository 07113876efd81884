"""Experts whose matrices lie (out, in) in memory, as turnout keeps them, against the same that lie (in, out).

    python -m benchmarks.layout [--rounds 9] [--shape T,D,E,K,F ...] [--out benchmarks/results]

The layer by sort, the executor of many rows, from tokens and a decision to the output, and with the gradients of all.
Both take turns in shuffled order in one process, with a new decision in every round; ratios are of the same round, CPU
time. The products alone are beside them, by torch's `mm` for a second factor in either order, with the rows that an
expert has.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.contestants import DTYPES, Case, Inputs, draw
from benchmarks.tables import heading, provenance, spread, write
from turnout.run import EXECUTORS
from turnout.types import ExpertWeights, Routing

SHAPES = ((4096, 512, 16, 1, 512), (2048, 512, 128, 6, 128), (1000, 512, 32, 4, 256), (64, 512, 64, 8, 128))
WAYS = ("(out, in)", "(in, out)")


def weights(case: Case) -> dict[str, ExpertWeights]:
    """The same numbers in both orders, leaves with gradients."""
    generator = torch.Generator().manual_seed(0)
    up_EOI = torch.randn(case.E, 2 * case.F, case.D, generator=generator) * case.D**-0.5
    down_EOI = torch.randn(case.E, case.D, case.F, generator=generator) * case.F**-0.5
    stacks = [stack.to(DTYPES[case.dtype]).mT for stack in (up_EOI, down_EOI)]
    made = {}
    for way in WAYS:
        lying = stacks if way == "(out, in)" else [stack.contiguous() for stack in stacks]
        made[way] = ExpertWeights(*(stack.detach().requires_grad_() for stack in lying))
    return made


def layer(case: Case, held: ExpertWeights, inputs: Inputs, train: bool) -> Tensor:
    """One step."""
    routing = Routing.from_topk(inputs.index_TK, inputs.weight_TK, num_experts=case.E)
    for leaf in (held.up_EDH, held.down_EFD, inputs.x_TD, inputs.weight_TK):
        leaf.grad = None
    with torch.set_grad_enabled(train):
        y_TD = EXECUTORS["sort"](inputs.x_TD, routing, held)
    if train:
        y_TD.backward(inputs.grad_TD)
    return y_TD.detach()


def products(case: Case, held: ExpertWeights) -> None:
    """Every expert's two products, of as many rows as it has on average."""
    rows, dtype = max(1, round(case.T * case.K / case.E)), DTYPES[case.dtype]
    with torch.no_grad():
        x, a = (torch.zeros(rows, size, dtype=dtype) for size in (case.D, case.F))
        for up_DH, down_FD in zip(held.up_EDH, held.down_EFD, strict=True):
            x @ up_DH, a @ down_FD


def measure(case: Case, rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU milliseconds of what is done by each way in every round."""
    held, order = weights(case), random.Random(0)
    first = [layer(case, one, draw(case, 0), False) for one in held.values()]
    off = float((first[0] - first[1]).norm() / first[1].norm())
    if not off < (1e-5 if case.dtype == "fp32" else 1e-2):
        raise SystemExit(f"no times for wrong answers: {case}, off by {off:.1e}")
    works: dict[str, Callable[[str, Inputs], object]] = {
        "forward": lambda way, inputs: layer(case, held[way], inputs, False),
        "forward+backward": lambda way, inputs: layer(case, held[way], inputs, True),
        "products alone": lambda way, _: products(case, held[way]),
    }
    found: dict[str, dict[str, list[float]]] = {what: {way: [] for way in WAYS} for what in works}
    for turn in range(-1, rounds):
        inputs = draw(case, seed=turn + 1)
        for what, work in works.items():
            for way in order.sample(WAYS, len(WAYS)):
                start = time.process_time()
                work(way, inputs)
                if turn >= 0:
                    found[what][way].append(1e3 * (time.process_time() - start))
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--shape", nargs="+", default=[",".join(map(str, shape)) for shape in SHAPES])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = provenance()
    lines = heading("Experts that lie (out, in) against (in, out)", about)
    lines += [f"Time of (out, in) over that of (in, out), medians of {options.rounds} interleaved rounds (least-most).",
              "", "| T,D,E,K,F | forward | forward+backward | products alone |", "|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines), flush=True)
    times = {}
    for dtype in options.dtype:
        for shape in options.shape:
            case = Case(*map(int, shape.split(",")), dtype=dtype)
            times[str(case)] = measure(case, options.rounds)
            cells = []
            for each in times[str(case)].values():
                cells.append(spread([a / b for a, b in zip(*(each[way] for way in WAYS), strict=True)]))
            lines.append(f"| {case} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    every = [statistics.median(each[WAYS[0]]) / statistics.median(each[WAYS[1]])
             for found in times.values() for what, each in found.items() if what == "forward+backward"]  # fmt: skip
    lines += ["", f"Training: at most {max(every):.2f}, {statistics.geometric_mean(every):.3f} in the geometric mean."]
    print(lines[-1])
    write(options.out, "layout", lines, {"about": about, "times_ms": times})


if __name__ == "__main__":
    main()
