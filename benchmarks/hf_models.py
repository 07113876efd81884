"""Times whole transformers models with their own experts and with turnout's: training steps, prompts and decoding.

    python -m benchmarks.hf_models [--rounds 9] [--threads 1] [--dtype fp32 bf16] [--out benchmarks/results]

Mixtral, Qwen3-MoE and DeepSeek-V3 are built from their configurations with small widths and random weights, so the
share of the experts is smaller than in the published models. The contestants are one model whose experts are
switched: transformers' eager loop, its default (grouped_mm), for decoding batched_mm too, and ``turnout.adopt``. They
take turns in shuffled order in every round, and every round has new tokens, thus new decisions. Before any time is
printed logits and gradients are compared: in fp32 with the eager ones, in bf16 with those in fp32, from which the eager
ones' own distance is the scale. Times are CPU time of the process; wall time is in the JSON file. A bar is held against
the fastest of transformers' own in each case.

What is around the experts is transformers' own code in all of them, so there is a limit. Two more take their turns:
the model with experts that return their tokens and cost nothing, and the bare products of its experts alone
(``benchmarks.contestants.Floor``). No experts make the model faster than the first allows, and none without products
of their own faster than both together.
"""

import argparse
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.contestants import Case, Floor
from benchmarks.contestants import draw as decisions
from benchmarks.tables import heading, provenance, spread, write
from turnout import adopt, release
from turnout.paths import Bank

# batched_mm writes out a copy of an expert for every token that takes it: there is memory for that in decoding alone.
CONTESTANTS, FEW = ("eager", "grouped_mm", "turnout"), ("eager", "grouped_mm", "batched_mm", "turnout")
NOTHING, PRODUCTS = "experts for nothing", "bare products"  # no contestants: what is to be reached at most
JOBS = ("forward+backward", "forward", "decoding")
BARS = {"fp32": 1.35, "bf16": 1.5}  # times the fastest of transformers' own, geometric mean; nowhere below 1
SHARED = {"vocab_size": 4096, "hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8,
          "max_position_embeddings": 1024, "pad_token_id": 0}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "Mixtral": {
        "num_key_value_heads": 2, "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2,
    },
    "Qwen3Moe": {
        "num_key_value_heads": 2, "head_dim": 64, "intermediate_size": 1024, "moe_intermediate_size": 192,
        "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": True,
    },
    "DeepseekV3": {
        "num_key_value_heads": 8, "intermediate_size": 1024, "moe_intermediate_size": 256, "n_routed_experts": 32,
        "num_experts_per_tok": 4, "n_shared_experts": 1, "n_group": 4, "topk_group": 2, "first_k_dense_replace": 1,
        "kv_lora_rank": 128, "q_lora_rank": 192, "qk_rope_head_dim": 32, "qk_nope_head_dim": 64, "v_head_dim": 64,
    },
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(family: str, dtype: str, layers: int) -> Any:
    """The model as transformers builds it, with random weights."""
    import transformers

    torch.manual_seed(0)
    sizes = SHARED | {"num_hidden_layers": layers} | MODELS[family]
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))
    return model.to(DTYPES[dtype])


def switch(model: Any, contestant: str) -> None:
    """The experts of this contestant."""
    if contestant == "turnout":
        adopt(model)
    else:
        release(model)
        model.set_experts_implementation("nothing" if contestant == NOTHING else contestant)


def nothing(experts: nn.Module, x_TD: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """The tokens themselves, so that gradients reach the router too."""
    return x_TD * weight_TK.sum(-1, keepdim=True).to(x_TD.dtype)


def floor(model: Any, options: argparse.Namespace) -> tuple[Floor, Case, int]:
    """The products of one block's experts, with even loads, and how many blocks there are."""
    blocks = [module for module in model.modules() if hasattr(module, "down_proj") and hasattr(module, "has_gate")]
    E, D, F = blocks[0].down_proj.shape
    dtype = {kind: name for name, kind in DTYPES.items()}[blocks[0].down_proj.dtype]
    case = Case(options.batch * options.seq, D, E, model.config.num_experts_per_tok, F, dtype)
    return Floor(case, Bank(E, D, F).to(DTYPES[dtype])), case, len(blocks)


def work(model: Any, job: str, ids: Tensor, options: argparse.Namespace) -> Callable[[], object]:
    """What is timed."""

    def train() -> Tensor:
        loss = model(ids, labels=ids).loss
        loss.backward()
        return loss

    def forward() -> Tensor:
        with torch.no_grad():
            return model(ids).logits

    def decode() -> Tensor:
        prompt = ids[:1, :8]
        ask = {"max_new_tokens": options.tokens, "min_new_tokens": options.tokens, "do_sample": False}
        return model.generate(prompt, attention_mask=torch.ones_like(prompt), **ask)

    return {"forward+backward": train, "forward": forward, "decoding": decode}[job]


def answers(model: Any, contestant: str, ids: Tensor) -> dict[str, Tensor]:
    """The logits and all gradients by these experts."""
    switch(model, contestant)
    model.zero_grad()
    output = model(ids, labels=ids)
    output.loss.backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {"logits": output.logits.detach().float()} | found


def off(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm().clamp_min(1e-20))


def wrong(found: dict[str, dict[str, Tensor]], exact: dict[str, Tensor], dtype: str) -> str:
    """What is not as it must be, empty where all is; ``exact`` are the eager loop's answers in fp32.

    In bf16 a token whose experts are nearly tied takes another one as soon as anything before rounds otherwise, in the
    eager loop too: gradients of a deep router are then a quarter off what they are in fp32, whoever computes them. So
    there nobody may be much further from the exact ones than the eager loop is, for each tensor.
    """
    for contestant, tensors in found.items():
        for name, tensor in tensors.items():
            allowed = 1e-4 if dtype == "fp32" else 1.5 * off(found["eager"][name], exact[name]) + 1e-2
            error = off(tensor, exact[name])
            if not error <= allowed:
                return f"{contestant}, {name} is off by {error:.1e}, where {allowed:.1e} is allowed"
    return ""


def few_wrong(found: dict[str, Tensor], exact: Tensor, dtype: str) -> str:
    """What is not as it must be in the logits of few tokens.

    One token of eight that takes another of two nearly tied experts is a third of the whole distance, so in bf16 it is
    the typical token that may not be much further off than the eager loop's.
    """
    rows = {name: (one - exact).norm(dim=-1) / exact.norm(dim=-1) for name, one in found.items()}
    for name, row in rows.items():
        error = float(row.max() if dtype == "fp32" else row.median())
        allowed = 1e-4 if dtype == "fp32" else 1.5 * float(rows["eager"].median()) + 1e-3
        if not error <= allowed or not bool(row.isfinite().all()):
            return f"{name}, logits of few tokens are off by {error:.1e}, where {allowed:.1e} is allowed"
    return ""


def check(model: Any, ids: Tensor, dtype: str) -> None:
    """Ends the run if any contestant's logits or gradients are wrong."""
    found = {contestant: answers(model, contestant, ids) for contestant in CONTESTANTS}
    switch(model, "eager")
    exact = found["eager"] if dtype == "fp32" else answers(copy.deepcopy(model).float(), "eager", ids)
    why = wrong(found, exact, dtype)
    del found, exact
    few, true = ids[:1, :8], copy.deepcopy(model).float()
    with torch.no_grad():
        logits = dict[str, Tensor]()
        for contestant in FEW:
            switch(model, contestant)
            logits[contestant] = model(few).logits.float()
        switch(true, "eager")
        why = why or few_wrong(logits, true(few).logits, dtype)
    if why:
        raise SystemExit(f"no times for wrong answers: {why}")


def draw(options: argparse.Namespace, turn: int) -> Tensor:
    g = torch.Generator().manual_seed(1000 + turn)
    return torch.randint(1, SHARED["vocab_size"], (options.batch, options.seq), generator=g)


def measure(model: Any, job: str, options: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    """CPU and wall seconds of every contestant in every round."""
    order, contestants = random.Random(0), FEW if job == "decoding" else CONTESTANTS
    contestants = (*contestants, NOTHING)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in (*contestants, PRODUCTS)}
    bare, case, blocks = floor(model, options)
    model.train(job == "forward+backward")
    for turn in range(-1, options.rounds):
        ids = draw(options, turn)
        for contestant in order.sample(contestants, len(contestants)):
            switch(model, contestant)
            model.zero_grad()
            run = work(model, job, ids, options)
            wall, cpu = time.perf_counter(), time.process_time()
            run()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            if turn >= 0:
                times[contestant].append((cpu, wall))
        bare.prepare(given := decisions(case, turn + 1))
        wall, cpu = time.perf_counter(), time.process_time()
        bare.run(given, job == "forward+backward")
        if turn >= 0:
            took = time.process_time() - cpu, time.perf_counter() - wall
            times[PRODUCTS].append((blocks * took[0], blocks * took[1]))
    model.zero_grad()
    if job == "decoding":  # of one token there are none to compare with: its experts are read, not multiplied
        del times[PRODUCTS]
    return times


def best(times: dict[str, list[tuple[float, float]]]) -> str:
    """The fastest of transformers' own, by the median."""
    own = [name for name in times if name not in ("turnout", NOTHING, PRODUCTS)]
    return min(own, key=lambda name: statistics.median(cpu for cpu, _ in times[name]))


def over(times: dict[str, list[tuple[float, float]]], name: str, other: str) -> list[float]:
    """How many times as fast one is as another, in every round."""
    return [theirs[0] / mine[0] for mine, theirs in zip(times[name], times[other], strict=True)]


def limits(times: dict[str, list[tuple[float, float]]]) -> list[float | None]:
    """How many times as fast as transformers' fastest a model is whose experts cost their products, and nothing."""
    theirs = times[best(times)]
    free = statistics.median(over(times, NOTHING, best(times)))
    if PRODUCTS not in times:
        return [None, free]
    parts = zip(theirs, times[NOTHING], times[PRODUCTS], strict=True)
    return [statistics.median(a[0] / (b[0] + c[0]) for a, b, c in parts), free]


def rows(case: str, job: str, times: dict[str, list[tuple[float, float]]], tokens: int) -> list[str]:
    """One line a contestant."""
    lines = []
    for name, seconds in times.items():
        if name in (NOTHING, PRODUCTS):
            continue
        cells = [case, job, name, spread([tokens / cpu for cpu, _ in seconds], ".0f")]
        for other in ("eager", "grouped_mm"):
            cells.append("" if other == name else f"{spread(over(times, name, other))} x")
        cells.append(f"{spread(over(times, name, best(times)))} x, {best(times)}" if name == "turnout" else "")
        most = ("-" if one is None else f"{one:.2f} x" for one in limits(times))
        cells.append(", ".join(most) if name == "turnout" else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def bars(cases: list[dict[str, Any]]) -> list[str]:
    """Whether the bars are met, for each dtype over all of its cases."""
    lines = ["", "## bars", "", "Times the fastest of transformers' own in each case, CPU time, medians of rounds.", "",
             "| | bar | measured | |", "|---|---|---|---|"]  # fmt: skip
    for dtype, bar in BARS.items():
        found = {
            f"{case['model']} {case['job']}": statistics.median(over(case["seconds"], "turnout", best(case["seconds"])))
            for case in cases
            if case["dtype"] == dtype
        }
        if found:
            least, mean = min(found, key=lambda where: found[where]), statistics.geometric_mean(found.values())
            slower = sum(value < 1 for value in found.values())
            said = "met" if not slower else f"**missed** in {slower} of {len(found)}"
            lines.append(f"| {dtype}, the least: {least} | >= 1 | {found[least]:.2f} | {said} |")
            said = "met" if mean >= bar else "**missed**"
            lines.append(f"| {dtype}, geometric mean of {len(found)} | >= {bar} | {mean:.2f} | {said} |")
            most = zip(*(limits(case["seconds"]) for case in cases if case["dtype"] == dtype), strict=True)
            for name, each in zip(("their bare products' time", "no time"), most, strict=True):
                known = [one for one in each if one is not None]
                if known:
                    line = f"{dtype}, were experts to take {name}: geometric mean of {len(known)}"
                    lines.append(f"| {line} | | {statistics.geometric_mean(known):.2f} | the limit |")
    return lines


def sizes(model: nn.Module) -> str:
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    return f"{total / 1e6:.0f} M parameters, {experts / total:.0%} of them in experts"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=["fp32", "bf16"])
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[*JOBS])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=32, help="decoded, one row, after a prompt of 8")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register("nothing", nothing)
    lines = heading("transformers models with their own experts and with turnout's", provenance())
    lines += [
        f"Models of {options.layers} layers, width {SHARED['hidden_size']}, random weights; {options.batch} x "
        f"{options.seq} tokens to train and to read, {options.tokens} to decode for one row. Medians over "
        f"{options.rounds} interleaved rounds (least-most), CPU time; the ratios are of the same round.",
        "",
        "The limit is what a model would reach whose experts took their bare products' time, and no time at all.",
        "",
        "| model | job | experts | tokens/s | times eager | times grouped_mm | times the fastest of theirs | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    record: dict[str, Any] = {"about": provenance(), "cases": []}
    notes = []
    for family in options.models:
        for dtype in options.dtype:
            model = build(family, dtype, options.layers)
            if dtype == options.dtype[0]:
                config = model.config
                experts = getattr(config, "num_local_experts", None) or config.num_experts
                notes.append(f"- {family}: top {config.num_experts_per_tok} of {experts} experts, {sizes(model)}.")
            check(model, draw(options, 0)[:, :128], dtype)
            for job in options.jobs:
                times = measure(model, job, options)
                count = options.tokens if job == "decoding" else options.batch * options.seq
                new = rows(f"{family} {dtype}", job, times, count)
                lines += new
                print("\n".join(new), flush=True)
                record["cases"].append({"model": family, "dtype": dtype, "job": job, "seconds": times})
    judged = bars(record["cases"])
    lines += ["", *notes, *judged]
    print("\n".join(judged), flush=True)
    print("\n".join(["", *notes]), file=sys.stderr)
    write(options.out, "hf_models", lines, record)


if __name__ == "__main__":
    main()
