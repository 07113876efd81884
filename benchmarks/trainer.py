"""Trains the demo's sparse model with ``turnout train``'s loop and, as a Mixtral, with transformers' model and Trainer.

    python -m benchmarks.trainer [--rounds 5] [--steps 20] [--threads 1] [--out benchmarks/results]

Every arm of every round is a fresh process, in shuffled order: the same starting weights, text, order of batches, batch
size, dtype, threads, optimizer and schedule. Their losses are compared step by step before any speed is printed. A step
counts from the end of the one before, with all that the loop does in between; the first ones are left out. Peak memory
is what the process held at most while it trained (its maximum resident set), with all the libraries it loaded.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import heading, provenance, spread, write

ARMS = {
    "turnout": "turnout train",
    "grouped_mm": "transformers, Trainer",
    "eager": "transformers, eager experts, Trainer",
    "adopted": "transformers adopted by turnout, Trainer",
}
SEED = 0


class Watch:
    """CPU and wall time at the end of every step, and the peak of memory at the last."""

    def __init__(self, warm: int) -> None:
        self.warm, self.marks, self.start_bytes, self.peak_bytes = warm, [], _resident(), 0

    def mark(self) -> None:
        """A step is over."""
        self.marks.append((time.process_time(), time.perf_counter()))
        self.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def found(self, tokens_per_step: int) -> dict[str, float]:
        """What the steps after the warm ones say."""
        (cpu, wall), (cpu_end, wall_end) = self.marks[self.warm - 1], self.marks[-1]
        tokens = tokens_per_step * (len(self.marks) - self.warm)
        return {
            "tokens_per_cpu_s": tokens / (cpu_end - cpu),
            "tokens_per_s": tokens / (wall_end - wall),
            "peak_bytes": self.peak_bytes,
            "start_bytes": self.start_bytes,
        }


def _resident() -> int:
    """Bytes in memory before the first step; 0 where the system does not say."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")), 0)


def run_of(options: argparse.Namespace) -> Any:
    """The demo's recipe with this benchmark's sizes: a constant rate, no balance losses, no pauses."""
    from turnout.recipes import tiny

    run = tiny()
    changes = {"steps": options.steps, "batch": options.batch, "seq": options.seq, "dtype": options.dtype}
    changes |= {"lr": 1e-3, "min_lr": 0.0, "warmup": 0, "schedule": "wsd", "decay": 0.0, "aux_weight": 0.0}
    changes |= {"z_weight": 0.0, "eval_every": 10**6, "eval_tokens": options.seq, "checkpoint_every": 10**6}
    return run.override([f"{name}={value}" for name, value in changes.items()] + ["log_every=1", f"seed={SEED}"])


def train_ours(options: argparse.Namespace, run: Any, tokens: Any, watch: Watch) -> list[float]:
    """The losses of ``turnout train``."""
    from turnout.models import checkpoint
    from turnout.train import train
    from turnout.train.progress import Silent

    class Marking(Silent):
        def advance(self, step: int) -> None:
            watch.mark()

    model = checkpoint.load(options.work / "own")
    watch.start_bytes = _resident()
    with tempfile.TemporaryDirectory() as out:
        train(model, tokens, run.train, Path(out) / "run", progress=Marking())
        lines = (Path(out) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record["loss"] for record in records if record["kind"] == "train"]


def train_theirs(options: argparse.Namespace, run: Any, tokens: Any, watch: Watch) -> list[float]:
    """The losses of transformers' Trainer on the same batches."""
    from transformers import MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from turnout.train.data import Stream

    config = run.train
    stream = Stream(tokens.train, batch=config.batch, seq=config.seq, seed=config.seed)

    class Rows(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return config.steps * config.batch

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            # As data sets of whole rows do: each is looked up for itself.
            if index % config.batch == 0:
                self.batch = stream.batch(index // config.batch)
            row = index % config.batch
            target_S = self.batch.target_BS[row]
            return {"input_ids": self.batch.id_BS[row], "labels": target_S, "shift_labels": target_S}

    class Marking(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            watch.mark()

    how = "grouped_mm" if options.arm == "adopted" else options.arm
    model = MixtralForCausalLM.from_pretrained(options.work / "hf", dtype=torch.float32, experts_implementation=how)
    if options.arm == "adopted":
        from turnout import adopt

        adopt(model)
    watch.start_bytes = _resident()
    arguments = TrainingArguments(
        output_dir=str(options.work / "trainer"),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch,
        learning_rate=config.lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.betas[0],
        adam_beta2=config.betas[1],
        max_grad_norm=config.clip,
        lr_scheduler_type="constant",
        bf16=config.dtype == "bf16",
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        save_strategy="no",
        report_to=[],
        logging_steps=1,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        seed=config.seed,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Rows(), callbacks=[Marking()])
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def one(options: argparse.Namespace) -> None:
    """One arm, in this process; its numbers go to arm.json."""
    from turnout.train.data import TokenSet

    run = run_of(options)
    tokens = TokenSet.open(options.work / "tokens")
    watch = Watch(options.warm)
    losses = (train_ours if options.arm == "turnout" else train_theirs)(options, run, tokens, watch)
    body = watch.found(run.train.tokens_per_step) | {"losses": losses}
    (options.work / "arm.json").write_text(json.dumps(body), encoding="utf-8")


def prepare(options: argparse.Namespace) -> None:
    """The tokens, and the same starting weights in both formats."""
    from turnout.models import LM, checkpoint
    from turnout.recipes.execute import tokens_for

    run = run_of(options)
    tokens_for(run, options.work / "tokens", quiet=True)
    lm = LM(run.model, seed=SEED)
    checkpoint.save(options.work / "own", lm)
    checkpoint.to_hf(lm, options.work / "hf", architecture="MixtralForCausalLM")


def compare(losses: dict[str, list[float]]) -> float:
    """The largest relative difference of any arm's loss at any step from ours; too large a one ends the run."""
    ours = losses["turnout"]
    worst = 0.0
    for arm, theirs in losses.items():
        if len(theirs) != len(ours):
            raise SystemExit(f"{arm} logged {len(theirs)} losses, turnout {len(ours)}")
        worst = max(worst, *(abs(a - b) / b for a, b in zip(theirs, ours, strict=True)))
    if worst > 1e-2:
        raise SystemExit(f"no speeds for different training: losses are {worst:.1e} apart: {json.dumps(losses)}")
    return worst


def call(options: argparse.Namespace, arm: str) -> dict[str, Any]:
    """One arm in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.trainer", "--arm", arm, "--work", str(options.work)]
    for name in ("steps", "warm", "batch", "seq", "threads", "dtype"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return json.loads((options.work / "arm.json").read_text(encoding="utf-8"))


def table(options: argparse.Namespace, found: dict[str, list[dict[str, Any]]], worst: float) -> list[str]:
    """The lines of the page."""
    lines = heading("Training: turnout train against transformers' own model and Trainer", provenance())
    lines += [
        f"The demo's model (`turnout train tiny`, as a Mixtral for transformers), batch {options.batch} x "
        f"{options.seq} tokens, {options.dtype}, {options.steps} steps of which the first {options.warm} are not "
        f"counted, {options.rounds} interleaved rounds. Medians (least-most). Losses agree to {worst:.0e} at every "
        "step. CPU tokens/s divide by the process's CPU time, tokens/s by the wall's.",
        "",
        "| arm | CPU tokens/s | tokens/s | turnout train is faster (CPU time) | peak MB | of which before step 1 |",
        "|---|---|---|---|---|---|",
    ]
    for arm, rounds in found.items():
        faster = [
            ours["tokens_per_cpu_s"] / one["tokens_per_cpu_s"]
            for ours, one in zip(found["turnout"], rounds, strict=True)
        ]
        cells = [ARMS[arm], spread([one["tokens_per_cpu_s"] for one in rounds], ".0f")]
        cells += [spread([one["tokens_per_s"] for one in rounds], ".0f"), f"{spread(faster)} x"]
        cells += [spread([one[name] / 1e6 for one in rounds], ".0f") for name in ("peak_bytes", "start_bytes")]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seq", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=["turnout", "grouped_mm", "adopted"])
    parser.add_argument("--arm", choices=[*ARMS], help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help="keep tokens and starting weights there")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.arm:
        one(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or Path(folder)
        if not (options.work / "hf").exists():
            prepare(options)
        order, found = random.Random(SEED), {arm: [] for arm in dict.fromkeys(["turnout", *options.arms])}
        for _ in range(options.rounds):
            for arm in order.sample(list(found), len(found)):
                found[arm].append(call(options, arm))
                speed = {name: round(found[arm][-1][name]) for name in ("tokens_per_cpu_s", "tokens_per_s")}
                print(ARMS[arm], speed, file=sys.stderr, flush=True)
            worst = compare({arm: rounds[-1]["losses"] for arm, rounds in found.items()})
    lines = table(options, found, worst)
    print("\n".join(lines))
    name = "trainer" if options.dtype == "fp32" else f"trainer-{options.dtype}"
    asked = {key: str(value) for key, value in vars(options).items() if key not in ("arm", "work", "out")}
    write(options.out, name, lines, {"about": provenance(), "options": asked, "found": found})


if __name__ == "__main__":
    main()
