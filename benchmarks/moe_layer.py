"""Times turnout's expert layer against the dense layer of equal active FLOPs, the bare products, and installed peers.

    python -m benchmarks.moe_layer [--quick] [--threads 1] [--out benchmarks/results]

Rounds are interleaved in shuffled order and every round has a new decision, as in training; a number is the median over
rounds of the ratio to the dense layer in the same round, with the least and the most. Values are checked against
``reference`` before any time is printed. Times are CPU time of the process; wall time is in the JSON file.
"""

import argparse
import datetime
import gc
import json
import platform
import random
import statistics
import subprocess
import time
from pathlib import Path

import torch

from benchmarks.contestants import Case, Contestant, Inputs, assemble, draw
from turnout.paths import Bank
from turnout.run import execute
from turnout.types import Routing

BARS = [
    (512, 256, 8, 2, 512),
    (4096, 256, 8, 2, 512),
    (512, 1024, 8, 2, 1024),
    (4096, 1024, 8, 2, 1024),
    (512, 256, 64, 8, 128),
    (4096, 256, 64, 8, 128),
    (512, 1024, 64, 8, 256),
    (4096, 1024, 64, 8, 256),
]
SKEWED = [(4096, 256, 8, 2, 512), (4096, 256, 64, 8, 128)]
DECODING = [(T, D, E, K, F) for T in (1, 8) for D in (256, 1024) for E, K, F in ((8, 2, D), (64, 8, D // 4))]
SPREAD = [
    (T, D, E, K, F)
    for T in (512, 4096)
    for D in (256, 1024)
    for E, K, F in ((8, 2, 2 * D), (8, 2, D), (64, 8, D // 2), (64, 8, D // 4), (256, 8, D // 4))
]


def cases(options: argparse.Namespace) -> list[Case]:
    if options.shape:
        shapes = [tuple(map(int, shape.split(","))) for shape in options.shape]
    elif options.quick:
        shapes = [BARS[0], BARS[4]]
    else:
        shapes = list(dict.fromkeys(BARS + (SPREAD if options.all else [])))
    found = [Case(*shape, dtype=dtype) for dtype in options.dtype for shape in shapes]
    if options.zipf:
        found = [Case(*shape, dtype=dtype, skew=1.5) for dtype in options.dtype for shape in shapes]
    elif not options.shape and not options.quick:
        found += [Case(*shape, dtype=dtype, skew=1.5) for dtype in options.dtype for shape in SKEWED]
    return found


def check(case: Case, contestants: list[Contestant]) -> list[str]:
    """The contestants whose output or gradients differ from the reference's, computed in fp32."""
    inputs = draw(case, seed=0)
    bank = Bank(case.E, case.D, case.F, generator=torch.Generator().manual_seed(0)).to(inputs.x_TD.dtype).float()
    x = inputs.x_TD.detach().float().requires_grad_()
    weight = inputs.weight_TK.detach().clone().requires_grad_()
    routing = Routing.from_topk(inputs.index_TK, weight, num_experts=case.E)
    y = execute(x, routing, bank.weights(), backend="reference")
    y.backward(inputs.grad_TD.float())
    wrong, allowed = [], 1e-4 if case.dtype == "fp32" else 3e-2
    for contestant in contestants:
        if not contestant.exact:
            continue
        contestant.prepare(inputs)
        got = contestant.run(inputs, train=True)
        pairs = {"y": (got, y), "dx": (inputs.x_TD.grad, x.grad), "dweight": (inputs.weight_TK.grad, weight.grad)}
        for what, (a, b) in pairs.items():
            error = float((a.float() - b).detach().norm() / b.detach().norm())
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
        for contestant in order.sample(contestants, len(contestants)):
            contestant.prepare(inputs)
            wall, cpu = time.perf_counter(), time.process_time()
            contestant.run(inputs, train)
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            contestant.prepare(inputs)
            if turn >= 0:
                times[contestant.name].append((cpu, wall))
    return times


def sweep(case: Case, rounds: int) -> dict[str, float]:
    """Seconds of one forward pass of few tokens, and of reading once the weights of the experts it chooses."""
    inputs = draw(case, seed=0)
    bank = Bank(case.E, case.D, case.F).to(inputs.x_TD.dtype)
    inputs_of = [draw(case, seed=turn) for turn in range(8)]
    found: dict[str, list[float]] = {"sort": [], "sweep": [], "dense": []}
    from turnout.paths import FeedForward

    dense = FeedForward(case.D, case.K * case.F).to(inputs.x_TD.dtype)
    with torch.no_grad():
        for turn in range(rounds * 10):
            inputs = inputs_of[turn % 8]
            routing = Routing.from_topk(inputs.index_TK, inputs.weight_TK, num_experts=case.E)
            chosen = routing.load_E.nonzero().flatten().tolist()
            start = time.perf_counter()
            bank(inputs.x_TD, routing)
            middle = time.perf_counter()
            for e in chosen:
                bank.up[e].sum()
                bank.down[e].sum()
            end = time.perf_counter()
            dense(inputs.x_TD)
            found["dense"].append(time.perf_counter() - end)
            found["sort"].append(middle - start)
            found["sweep"].append(end - middle)
    return {name: statistics.median(values) for name, values in found.items()}


def about() -> dict[str, str]:
    """Hardware, versions and commit."""
    processor = platform.processor() or platform.machine()
    lines = Path("/proc/cpuinfo")
    if lines.exists():
        names = [line.split(":")[1].strip() for line in lines.read_text().splitlines() if line.startswith("model name")]
        processor = f"{len(names)} x {names[0]}" if names else processor
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {"processor": processor, "python": platform.python_version(), "torch": torch.__version__}
    try:
        import transformers

        about["transformers"] = transformers.__version__
    except ImportError:
        pass
    return about | {"capability": torch.backends.cpu.get_cpu_capability(), "commit": git.stdout.strip() or "unknown"}


def row(case: Case, times: dict[str, dict[str, list]], saved: dict[str, int], name: str) -> str:
    cells = []
    for kind in ("forward", "forward+backward"):
        if name not in times[kind]:
            cells += ["", ""]
            continue
        ratios = [a[0] / b[0] for a, b in zip(times[kind][name], times[kind]["dense"], strict=True)]
        middle = statistics.median(cpu for cpu, _ in times[kind][name])
        cells += [f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})", f"{middle * 1e3:.1f}"]
    kept = f"{saved[name] / saved['dense']:.2f}" if name in saved else ""
    return f"| {case} | {name} | " + " | ".join(cells) + f" | {kept} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small shapes")
    parser.add_argument("--all", action="store_true", help="every shape, not only those with a bar")
    parser.add_argument("--shape", action="append", help="T,D,E,K,F; may be repeated")
    parser.add_argument("--dtype", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--zipf", action="store_true", help="skewed loads only")
    parser.add_argument("--only", nargs="+", help="contestants whose name contains one of these")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for a dated table (markdown) and all times (JSON)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    record: dict = {
        "about": about() | {"threads": options.threads, "rounds": options.rounds},
        "cases": [],
        "decoding": [],
    }
    lines = [
        "# Expert layer: time as a multiple of the dense layer of equal active FLOPs",
        "",
        f"{datetime.date.today()}; " + ", ".join(f"{k} {v}" for k, v in record["about"].items()),
        "",
        "Median over interleaved rounds (least-most) of CPU time, a new decision every round; kept is what is saved",
        "for the backward pass. Cases are dtype and T,D,E,K,F.",
        "",
        "| case | layer | forward | ms | forward+backward | ms | kept |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    for case in cases(options):
        contestants, absent = assemble(case, options.only)
        wrong = check(case, contestants)
        if wrong:
            raise SystemExit(f"{case}: no times for wrong answers: " + "; ".join(wrong))
        saved = {c.name: saved_bytes(c, draw(case, 0)) for c in contestants if c.name != "floor"}
        times: dict[str, dict[str, list]] = {}
        for kind, train in (("forward", False), ("forward+backward", True)):
            # The loop over experts of transformers takes a hundred times the dense layer's time to train many experts.
            quick = [c for c in contestants if not (train and case.E > 8 and c.name.endswith(("eager", "batched_mm")))]
            times[kind] = measure(case, quick, options.rounds, train, options.seed)
        new = [row(case, times, saved, c.name) for c in contestants]
        lines += new
        print("\n".join(new), flush=True)
        record["cases"].append({"case": str(case), "times": times, "saved": saved, "absent": absent})
    if not options.shape:
        lines += ["", "| decoding | sort, us | x sweep of the chosen weights | x dense |", "|---|---|---|---|"]
        for case in [Case(*shape, dtype=dtype) for dtype in options.dtype for shape in DECODING]:
            found = sweep(case, options.rounds)
            record["decoding"].append({"case": str(case)} | found)
            lines.append(
                f"| {case} | {found['sort'] * 1e6:.0f} | {found['sort'] / found['sweep']:.2f} | "
                f"{found['sort'] / found['dense']:.2f} |"
            )
            print(lines[-1], flush=True)
    if record["cases"]:
        lines += ["", *(f"{name}: {why}." for name, why in record["cases"][-1]["absent"].items())]
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        stem = f"moe_layer-{datetime.date.today()}"
        (options.out / f"{stem}.md").write_text("\n".join(lines) + "\n")
        (options.out / f"{stem}.json").write_text(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
