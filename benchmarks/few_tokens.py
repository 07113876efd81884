"""Few tokens at a time: the layer's time against one sweep over the weights of the experts it chooses.

A sweep reads those bytes once: every chosen expert's ``up`` and ``down``, as torch holds them, by whichever of torch's
reductions reads them fastest on this machine (sum in fp32, sum as 32- or 64-bit integers, maximum), one call per
matrix; which one won is printed. That is stricter than a product would be: no product of torch reads as fast.

Cold: the layers of a model one after the other, so many that the weights they choose do not fit the last cache; all of
them by one contestant, then all by the other. Warm: one layer and one decision, over and over. Every pass of every
layer has a fresh routing, of which nothing is cached; the making of routings is a column of its own.
"""

import dataclasses
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.contestants import DTYPES, Case, Dense, Inputs, draw
from turnout.paths import Bank
from turnout.types import Routing

SHAPES = [(T, D, E, K, F) for T in (1, 2, 4, 8) for D in (256, 1024) for E, K, F in ((8, 2, D), (64, 8, D // 4))]
_CACHES_BYTES, _MOST_BYTES, _MOST_LAYERS = 64 << 20, 256 << 20, 256

READERS: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda w: w.sum(),
    "sum as fp32": lambda w: w.view(torch.float32).sum(),
    "sum as int64": lambda w: w.view(torch.int64).sum(),
    "max as int32": lambda w: w.view(torch.int32).amax(),
}


def _timed(work: Callable[[], object]) -> float:
    start = time.process_time_ns()
    work()
    return (time.process_time_ns() - start) / 1e3


def _lying(stack: Tensor) -> Tensor:
    """The matrices as they lie in memory."""
    return stack if stack.stride(-1) == 1 else stack.transpose(1, 2)


def _fastest_reader(bank: Bank, rounds: int) -> str:
    """The reduction that reads one expert in the least time."""
    matrices = [_lying(stack.detach())[0] for stack in (bank.up_EDH, bank.down_EFD)]

    def seconds(read: Callable[[Tensor], object]) -> float:
        return statistics.median(_timed(lambda: [read(w) for w in matrices]) for _ in range(5 * rounds))

    return min(READERS, key=lambda name: seconds(READERS[name]))


def _layers(case: Case, same: bool) -> int:
    """How many layers it takes to leave the caches, as far as memory goes."""
    each = 3 * case.D * case.F * DTYPES[case.dtype].itemsize
    chosen = case.E * (1 - (1 - case.K / case.E) ** (1 if same else case.T)) * each
    return max(1, min(round(_CACHES_BYTES / chosen) + 1, _MOST_BYTES // (each * case.E), _MOST_LAYERS))


@torch.inference_mode()
def decode(case: Case, rounds: int, seed: int = 0, *, same: bool = False) -> dict[str, object]:
    """Median microseconds of CPU time per layer: turnout, the sweep, the dense layer, and making the routing.

    Args:
        case: the shape.
        rounds: how many, twice.
        seed: of weights, decisions and order.
        same: whether all tokens take the experts of the first: T rows each.
    """
    g, order = torch.Generator().manual_seed(seed), random.Random(seed)
    banks = [Bank(case.E, case.D, case.F, generator=g).to(DTYPES[case.dtype]) for _ in range(_layers(case, same))]
    denses = [Dense(case) for _ in banks]
    name = _fastest_reader(banks[0], rounds)
    read = READERS[name]
    stacks = [(_lying(bank.up_EDH), _lying(bank.down_EFD)) for bank in banks]
    found: dict[str, list[float]] = {}

    def passes(layers: list[int], prefix: str, inputs: list[Inputs]) -> None:
        def route(layer: int) -> Routing:
            return Routing.from_topk(inputs[layer].index_TK, inputs[layer].weight_TK, num_experts=case.E)

        routings = [route(layer) for layer in range(len(layers))]
        matrices = [
            [stack[e] for e in sorted(set(given.index_TK.flatten().tolist())) for stack in stacks[i]]
            for i, given in zip(layers, inputs, strict=True)
        ]
        works: dict[str, Callable[[], object]] = {
            "ours_us": lambda: [banks[i](inputs[n].x_TD, routings[n]) for n, i in enumerate(layers)],
            "sweep_us": lambda: [read(w) for each in matrices for w in each],
            "dense_us": lambda: [denses[i].call(inputs[n]) for n, i in enumerate(layers)],
            "routing_us": lambda: [route(n) for n in range(len(layers))],
        }
        for what in order.sample(sorted(works), len(works)):
            found.setdefault(prefix + what, []).append(_timed(works[what]) / len(layers))

    def drawn(seed: int) -> Inputs:
        inputs = draw(case, seed=seed)
        return dataclasses.replace(inputs, index_TK=inputs.index_TK[:1].repeat(case.T, 1)) if same else inputs

    for turn in range(-1, 2 * rounds):
        passes([*range(len(banks))], "", [drawn(1000 * turn + layer + 2000) for layer in range(len(banks))])
        passes([0] * 8, "warm_", [drawn(turn + 1)] * 8)
    return {"case": str(case), "reader": name, "layers": len(banks)} | {
        what: statistics.median(values[len(values) // (2 * rounds + 1) :]) for what, values in sorted(found.items())
    }


HEAD = [
    "",
    "## decoding",
    "",
    "Microseconds of CPU time, median; x sweep is over one reading of the chosen experts' weights, by the reduction",
    "named, with cold memory and with warm caches. x dense is over torch's dense layer of equal active FLOPs, cold.",
    "",
    "| case | turnout | sweep | x sweep | warm: turnout | sweep | x sweep | x dense | routing | read by |",
    "|---|---|---|---|---|---|---|---|---|---|",
]


def row(found: dict) -> str:
    """A line of the table."""
    ours, sweep, warm, warm_sweep = (found[k] for k in ("ours_us", "sweep_us", "warm_ours_us", "warm_sweep_us"))
    return (
        f"| {found['case']} | {ours:.0f} | {sweep:.0f} | {ours / sweep:.2f} | {warm:.0f} | {warm_sweep:.0f} | "
        f"{warm / warm_sweep:.2f} | {ours / found['dense_us']:.2f} | {found['routing_us']:.0f} | {found['reader']} |"
    )
