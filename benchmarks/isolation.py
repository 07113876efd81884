"""What it costs that a row's bits are its own: layers and a model within ``batch_invariant``, against the usual way.

    python -m benchmarks.isolation [--rounds 9] [--tokens 1 4 16 64 256] [--out benchmarks/results]

The whole layer, router and all, without gradients; beside its time how many different outputs three victim's tokens
have over 40 batches of 0 to 99 other tokens, each way; of the model, three of 0 to 19 other rows. Both ways take turns
in shuffled order in one process, with new tokens in every round; ratios are of the same round, CPU time. Once with
compiled kernels, where they are, and once with torch alone. At the end the audit's overflow: how far a victim's output
is moved by others who fill the experts that it needs, of a layer with a limit of capacity and of ours.
"""

import argparse
import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.tables import heading, provenance, spread, write
from turnout.decide.token import TopK
from turnout.layers import MoE
from turnout.measure import audit
from turnout.models import LM, LMConfig, MoEConfig
from turnout.run.compiled import compiled_here
from turnout.types import batch_invariant

SHAPES = ((512, 32, 4, 256), (512, 128, 6, 128), (1024, 16, 2, 1024))  # D, E, K, F
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
WAYS = {"usual": contextlib.nullcontext, "batch_invariant": batch_invariant}
VICTIM, BATCHES, SEQ = 3, 40, 16
MOST = {"layer": 100, "model": 20}


def layer(shape: tuple[int, ...], dtype: torch.dtype, **limits: Any) -> MoE:
    """A layer of experts with normal weights."""
    D, E, K, F = shape
    chance = torch.Generator().manual_seed(0)
    router = TopK(D, E, top_k=K, std=D**-0.5, generator=chance, **limits)
    return MoE(D, F, E, router=router, std=D**-0.5, generator=chance).to(dtype).eval()


def model(dtype: torch.dtype) -> LM:
    """A small model of four routed layers."""
    moe = MoEConfig(num_experts=32, top_k=4, hidden=256)
    return LM(LMConfig(vocab_size=4096, width=512, layers=4, heads=8, kv_heads=4, max_seq=64, moe=moe)).to(dtype).eval()


def outputs(run: Callable[[Tensor], Tensor], draw: Callable[[int, int], Tensor], most: int) -> int:
    """How many different outputs a victim's rows have beside others."""
    chance, seen, victim = random.Random(0), set(), draw(VICTIM, 1)
    for batch in range(BATCHES):
        count = chance.randrange(most)
        at = chance.randrange(count + 1)
        others = draw(count, 2 + batch)
        y = run(torch.cat((others[:at], victim, others[at:])))[at : at + VICTIM]
        seen.add(y.contiguous().view(torch.uint8).numpy().tobytes())
    return len(seen)


def measure(
    run: Callable[[Tensor], Tensor], draw: Callable[[int, int], Tensor], rows: int, rounds: int
) -> dict[str, list[float]]:
    """CPU milliseconds of each way in every round; several calls where one is short."""
    found: dict[str, list[float]] = {way: [] for way in WAYS}
    order = random.Random(rows)
    start = time.process_time()
    run(draw(rows, 0))
    calls = max(1, min(50, int(0.02 / max(time.process_time() - start, 1e-5))))
    for turn in range(-1, rounds):
        x = draw(rows, turn + 1)
        for way in order.sample([*WAYS], len(WAYS)):
            with WAYS[way]():
                start = time.process_time()
                for _ in range(calls):
                    run(x)
                if turn >= 0:
                    found[way].append(1e3 * (time.process_time() - start) / calls)
    return found


@contextlib.contextmanager
def kernels(there: bool) -> Iterator[None]:
    """With compiled kernels, or without."""
    before = os.environ.get("TURNOUT_COMPILED")
    if not there:
        os.environ["TURNOUT_COMPILED"] = "0"
    try:
        yield
    finally:
        os.environ.pop("TURNOUT_COMPILED", None)
        if before is not None:
            os.environ["TURNOUT_COMPILED"] = before


def cases(dtype: str) -> dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int, int], Tensor]]]:
    """What runs, and what draws so many rows for it, by its name."""
    kind, found = DTYPES[dtype], {}

    def numbers(width: int) -> Callable[[int, int], Tensor]:
        return lambda rows, seed: torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).to(kind)

    for shape in SHAPES:
        one = layer(shape, kind)
        found[f"layer {','.join(map(str, shape))}"] = (lambda x, one=one: one(x).output, numbers(shape[0]))
    lm = model(kind)

    def ids(rows: int, seed: int) -> Tensor:
        return torch.randint(4096, (rows, SEQ), generator=torch.Generator().manual_seed(seed))

    found[f"model, rows of {SEQ}"] = (lambda x: lm(x).logits_BSV[:, -1], ids)
    return found


def attacked() -> list[str]:
    """How far the overflow of the audit moves a victim, with a limit of capacity and within ``batch_invariant``."""
    lines = ["", "| overflow, of the length of the victim's output | moved | outputs |", "|---|---|---|"]
    for dtype in DTYPES.values():
        with_limit = audit(layer(SHAPES[0], dtype, capacity_factor=2.0, priority="position"))["overflow"]
        with batch_invariant():
            ours = audit(layer(SHAPES[0], dtype))["overflow"]
        for how, found in (("twice an even load, the earliest first", with_limit), ("ours, batch_invariant", ours)):
            lines.append(f"| {str(dtype)[6:]}, {how} | {found.difference:.3g} | {found.outputs} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    about = provenance()
    lines = heading("What isolation costs", about)
    lines += [f"Time within batch_invariant over that of the usual way, medians of {options.rounds} interleaved rounds "
              "(least-most), by tokens (of the model: rows) in the batch; and outputs of a victim over 40 batches.",
              "", f"| D,E,K,F | {' | '.join(map(str, options.tokens))} | outputs, usual | outputs, invariant |",
              f"|---|{'---|' * (len(options.tokens) + 2)}"]  # fmt: skip
    print("\n".join(lines), flush=True)
    record: dict[str, object] = {"about": {name: str(value) for name, value in about.items()}}
    for there in (True, False) if compiled_here() else (False,):
        for dtype in options.dtype:
            for name, (run, draw) in cases(dtype).items():
                with kernels(there):
                    times = {rows: measure(run, draw, rows, options.rounds) for rows in options.tokens}
                    seen = []
                    for way in WAYS.values():
                        with way():
                            seen.append(outputs(run, draw, MOST[name[:5]]))
                cells = [
                    spread([a / b for a, b in zip(each["batch_invariant"], each["usual"], strict=True)])
                    for each in times.values()
                ]
                how = "kernels" if there else "torch alone"
                lines.append(f"| {how}, {dtype} {name} | {' | '.join(cells)} | {seen[0]} | {seen[1]} |")
                print(lines[-1], flush=True)
                record[f"{how} {dtype} {name}"] = {"ms": times, "outputs": dict(zip(WAYS, seen, strict=True))}
    lines += attacked()
    print("\n".join(lines[-7:]), flush=True)
    write(options.out, "isolation", lines, record)


if __name__ == "__main__":
    main()
