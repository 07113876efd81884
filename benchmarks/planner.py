"""How far the planner's steps are from real ones: training by several layouts on processes of this machine.

    python -m benchmarks.planner                 four processes, five layouts, a few minutes
    python -m benchmarks.planner --out results.json

The machine is measured first, as ``turnout plan --here`` does; then each layout trains under torchrun, round by round,
and the median step is held against what was foreseen.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from turnout.decide.device import held, pace
from turnout.measure import hardware
from turnout.recipes.cluster import measured_cluster
from turnout.recipes.layouts import run_of
from turnout.recipes.parity import plan_of
from turnout.recipes.workload import workload_of
from turnout.storage import write_whole

LAYOUTS = ("dp_replicate=4,zero=0", "dp_shard=4,zero=1", "dp_shard=4", "dp_shard=4,ep=2", "dp_shard=4,ep=4,zero=2")
FIELDS = ["width=128", "seq=128", "max_seq=128", "batch=16", "vocab_size=1024", "moe.hidden=192"]
STEPS, EVERY = 24, 4


def measured(layout: str, folder: Path, number: int) -> float:
    """Seconds of a step, the median over stretches of a few after the first."""
    out = folder / f"{layout.replace(',', '-').replace('=', '')}-{number}"
    fields = [*FIELDS, f"steps={STEPS}", "warmup=2", f"log_every={EVERY}", f"eval_every={STEPS}", "eval_tokens=2048"]
    fields += [f"checkpoint_every={STEPS}", "limit_mb=1"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "-m", "turnout"]
    command = [*launch, "train", "tiny", *fields, "--layout", layout, "--out", str(out), "--quiet"]
    subprocess.run(
        [*command, "--tokens", str(folder / "tokens")], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates = [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]
    return 16 * 128 / statistics.median(rates[1:])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, foresees, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, metavar="N", help="runs of each layout (2)")
    parser.add_argument("--out", metavar="FILE", help="also write the numbers here, as JSON")
    asked = parser.parse_args(arguments)
    run = run_of("tiny", FIELDS)
    workload = workload_of(run)
    rows, found = [], {layout: list[float]() for layout in LAYOUTS}
    with tempfile.TemporaryDirectory(prefix="turnout-planner-") as folder:
        cluster = measured_cluster(4, run)
        for number in range(asked.rounds):
            for layout in LAYOUTS:
                found[layout].append(measured(layout, Path(folder), number))
    print(f"{'layout':<26} {'foreseen':>9} {'measured':>9} {'error':>7}   state on a device")
    for layout, times in found.items():
        plan = plan_of(layout)
        foreseen, real = pace(workload, cluster, plan).step_s, statistics.median(times)
        kinds = held(workload, plan).by_kind
        state = sum(kinds[kind] for kind in ("parameters", "gradients", "optimizer"))
        rows.append({"layout": layout, "foreseen_s": foreseen, "measured_s": times, "error": foreseen / real - 1})
        times_ms = f"{foreseen * 1e3:>6.0f} ms {real * 1e3:>6.0f} ms {foreseen / real - 1:>+7.0%}"
        print(f"{layout:<26} {times_ms}   {state / 1e6:.2f} MB")
    worst = max(abs(float(row["error"])) for row in rows)
    order = sorted(found, key=lambda layout: statistics.median(found[layout]))
    print(f"worst error {worst:.0%}; measured order: {', '.join(order)}; load {os.getloadavg()[0]:.1f}")
    if asked.out:
        body = {"rows": rows, "load": os.getloadavg()[0], "hardware": hardware()}
        write_whole(asked.out, json.dumps(body, indent=2) + "\n")


if __name__ == "__main__":
    main()
