"""Times turnout's expert layer against the dense layer of equal active FLOPs, the bare products, and installed peers.

    OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE python -m benchmarks.moe_layer [--bars] [--out benchmarks/results]

There are two dense layers: "dense" is three products of torch, as people have it; "dense, ours" is turnout's
FeedForward, whose products take the fastest kernel that the machine has, and so is the stricter measure. Rounds are
interleaved in shuffled order and every round has a new decision, as in training; a number is the median over rounds of
the ratio to a dense layer in the same round, with the least and the most. Values are checked against ``reference``
before any time is printed. Times are CPU time of the process; wall time is in the JSON file.

``--bars`` runs only what the bars need (benchmarks.bars), in about five minutes of one thread.
"""

import argparse
import datetime
import gc
import json
import random
import statistics
import time
from pathlib import Path

import torch

from benchmarks import bars, few_tokens
from benchmarks.contestants import Case, Contestant, Inputs, draw
from benchmarks.peers import assemble
from benchmarks.tables import heading, provenance, spread
from turnout.paths import Bank
from turnout.run import execute
from turnout.types import Routing

BARS = [*bars.AT_MOST["fp32"], (512, 256, 8, 2, 512), (512, 1024, 8, 2, 1024)]
SKEWED = [(4096, 256, 8, 2, 512), (4096, 256, 64, 8, 128)]
SPREAD = [
    (T, D, E, K, F)
    for T in (512, 4096)
    for D in (256, 1024)
    for E, K, F in ((8, 2, 2 * D), (8, 2, D), (64, 8, D // 2), (64, 8, D // 4), (256, 8, D // 4))
]


def cases(options: argparse.Namespace) -> list[Case]:
    if options.bars:
        found = [Case(*shape, dtype=dtype) for dtype in options.dtype for shape in bars.AT_MOST[dtype]]
        # Timed by no bar, but its saved bytes are bound by one.
        found += [Case(512, 256, 64, 8, 128, dtype="bf16")] if "bf16" in options.dtype else []
    else:
        shapes = [tuple(map(int, shape.split(","))) for shape in options.shape or ()]
        shapes = shapes or list(dict.fromkeys(BARS + (SPREAD if options.all else [])))
        found = [Case(*shape, dtype=dtype, skew=options.zipf) for dtype in options.dtype for shape in shapes]
    if not options.shape:
        found += [Case(*shape, dtype=dtype, skew=1.5) for dtype in options.dtype for shape in SKEWED]
    return found


def check(case: Case, contestants: list[Contestant]) -> list[str]:
    """The contestants whose output or gradients differ from the reference's, computed in fp32."""
    inputs = draw(case, seed=0)
    bank = Bank(case.E, case.D, case.F, generator=torch.Generator().manual_seed(0)).to(inputs.x_TD.dtype).float()

    def expected(normalised: bool) -> dict[str, torch.Tensor]:
        x = inputs.x_TD.detach().float().requires_grad_()
        weight = inputs.weight_TK.detach().clone().requires_grad_()
        taken = weight / weight.sum(1, keepdim=True) if normalised else weight
        routing = Routing.from_topk(inputs.index_TK, taken, num_experts=case.E)
        y = execute(x, routing, bank.weights(), backend="reference")
        y.backward(inputs.grad_TD.float())
        assert x.grad is not None and weight.grad is not None
        return {"y": y.detach(), "dx": x.grad, "dweight": weight.grad}

    exact = {normalised: expected(normalised) for normalised in {c.normalises for c in contestants if c.exact}}
    wrong, allowed = [], 1e-4 if case.dtype == "fp32" else 3e-2
    for contestant in contestants:
        if not contestant.exact:
            continue
        contestant.prepare(inputs)
        got = {
            "y": contestant.run(inputs, train=True).detach(),
            "dx": inputs.x_TD.grad,
            "dweight": inputs.weight_TK.grad,
        }
        for what, b in exact[contestant.normalises].items():
            error = float((got[what].float() - b).norm() / b.norm())
            if not error < allowed:
                wrong.append(f"{contestant.name}: {what} is off by {error:.1e}")
        contestant.prepare(inputs)
    return wrong


def saved_bytes(contestant: Contestant, inputs: Inputs) -> int:
    """Bytes kept for the backward pass besides the inputs and the parameters."""
    known = {t.untyped_storage().data_ptr() for t in (inputs.x_TD, inputs.weight_TK, *contestant.parameters)}
    seen: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = contestant.call(inputs)
    del y
    return sum(seen.values())


def measure(case: Case, contestants: list[Contestant], rounds: int, train: bool, seed: int) -> dict[str, list]:
    """CPU and wall seconds of every contestant in every round."""
    order = random.Random(seed)
    times: dict[str, list] = {c.name: [] for c in contestants}
    gc.collect()
    for turn in range(-1, rounds):
        inputs = draw(case, seed=1000 + seed + turn)
        for contestant in sorted(order.sample(contestants, len(contestants)), key=lambda one: one.last):
            contestant.prepare(inputs)
            wall, cpu = time.perf_counter(), time.process_time()
            contestant.run(inputs, train)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            contestant.prepare(inputs)
            if turn >= 0:
                times[contestant.name].append((cpu, wall))
    return times


def row(case: Case, times: dict[str, dict[str, list]], saved: dict[str, int], name: str) -> str:
    cells = []
    for kind in bars.KINDS:
        if name not in times[kind]:
            cells += ["", "", ""]
            continue
        for dense in (bars.TORCH, bars.FAST):
            pairs = zip(times[kind][name], times[kind][dense], strict=True)
            cells.append(spread([a[0] / b[0] for a, b in pairs]))
        cells.append(f"{statistics.median(cpu for cpu, _ in times[kind][name]) * 1e3:.1f}")
    kept = f"{saved[name] / saved[bars.TORCH]:.2f}" if name in saved else ""
    return f"| {case} | {name} | " + " | ".join(cells) + f" | {kept} |"


def of_case(case: Case, options: argparse.Namespace) -> tuple[dict, list[str]]:
    """Checks, then times one case: the record and the lines of the table."""
    names = options.only or (["floor", "turnout sort", "grouped_mm"] if options.bars else None)
    if options.bars and case.skew:
        names = ["turnout sort"]
    contestants, absent = assemble(case, names)
    wrong = check(case, contestants)
    if wrong:
        raise SystemExit(f"{case}: no times for wrong answers: " + "; ".join(wrong))
    saved = {c.name: saved_bytes(c, draw(case, 0)) for c in contestants if c.name != "floor"}
    times: dict[str, dict[str, list]] = {}
    for kind, train in zip(bars.KINDS, (False, True), strict=True):
        # The loop over experts of transformers takes a hundred times the dense layer's time to train many experts.
        quick = [c for c in contestants if not (train and case.E > 8 and c.name.endswith(("eager", "batched_mm")))]
        times[kind] = measure(case, quick, options.rounds, train, options.seed)
    load = [draw(case, seed=1000 + options.seed + turn).index_TK.flatten().bincount().max() for turn in range(8)]
    record = {
        "case": str(case),
        "dtype": case.dtype,
        "shape": [case.T, case.D, case.E, case.K, case.F],
        "skew": case.skew,
        "max_over_mean_load": statistics.median(map(float, load)) * case.E / (case.T * case.K),
        "checked": [c.name for c in contestants if c.exact],
        "times": times,
        "saved": saved,
        "absent": absent,
    }
    return record, [row(case, times, saved, c.name) for c in contestants]


HEAD = [
    "Median over interleaved rounds (least-most) of CPU time over that of the dense layer of equal active FLOPs:",
    "torch's (three `nn.functional.linear`), and ours (turnout's FeedForward). A new decision every round. kept: bytes",
    "saved for the backward pass over those of torch's dense layer. Cases are dtype and T,D,E,K,F. Every layer but the",
    "dense ones and the floor (the bare products on sorted rows) was checked against `reference` before it was timed.",
    "",
    "| case | layer | forward / torch | / ours | ms | forward+backward / torch | / ours | ms | kept |",
    "|---|---|---|---|---|---|---|---|---|",
]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bars", action="store_true", help="only what the bars need")
    parser.add_argument("--all", action="store_true", help="every shape, not only those with a bar")
    parser.add_argument("--shape", action="append", help="T,D,E,K,F; may be repeated")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--zipf", type=float, default=0.0, help="exponent of the skew of all shapes")
    parser.add_argument("--only", nargs="+", help="contestants whose name contains one of these")
    parser.add_argument("--rounds", type=int, help="4 with --bars, else 7")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for a dated table (markdown) and all times (JSON)")
    parser.add_argument("--name", default="moe-layer-cpu", help="of the two files, after the date")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    options.rounds = options.rounds or (4 if options.bars else 7)
    torch.set_num_threads(options.threads)
    record: dict = {"about": provenance() | {"rounds": options.rounds}, "cases": [], "decoding": []}
    lines = heading("Expert layer on the CPU", record["about"]) + HEAD
    print("\n".join(lines), flush=True)

    def say(new: list[str]) -> None:
        lines.extend(new)
        print("\n".join(new), flush=True)

    for case in cases(options):
        entry, new = of_case(case, options)
        record["cases"].append(entry)
        say(new)
    skewed = [e for e in record["cases"] if e["skew"]]
    say(["", *(f"{e['case']}: the fullest expert has {e['max_over_mean_load']:.1f} x the mean load." for e in skewed)])
    absent = {name: why for entry in record["cases"] for name, why in entry["absent"].items()}
    say(["", "Not timed: " + "; ".join(f"{name} ({why})" for name, why in absent.items()) + "."])
    if not options.shape:
        say(few_tokens.HEAD)
    for case in [Case(*s, dtype=dtype) for dtype in options.dtype for s in few_tokens.SHAPES if not options.shape]:
        record["decoding"].append(few_tokens.decode(case, min(options.rounds, 3)))
        say([few_tokens.row(record["decoding"][-1])])
    if options.bars or not options.out:
        found = bars.judge(record)
        record["bars"] = [vars(bar) for bar in found]
        say(["", *bars.table(found)])
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = options.out / f"{datetime.date.today()}-{options.name}"
        stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
