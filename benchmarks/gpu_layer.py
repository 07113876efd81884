"""Times turnout's expert layer on a GPU against torch's grouped products and the rate of a dense product.

    python -m benchmarks.gpu_layer [--quick] [--profile] [--shape T,D,E,K,F] [--out benchmarks/results]

Values and gradients are checked against ``reference`` in fp32 before anything is timed. The contestants take turns in
every round, and every round has a new decision, as in training; a time is the median over rounds with the least and
the most, by CUDA events, and spans all from the chosen experts to the output or the gradients. TFLOP/s count the
products alone (2 per multiply-add, backward twice forward); the share is that of an 8192^3 product in the same run.
"""

import argparse
import dataclasses
import datetime
import json
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from turnout.run import EXECUTORS, reference
from turnout.run.kernels import kernels
from turnout.types import ExpertWeights, Routing

SHAPES = [(32768, 4096, 64, 8, 1024), (32768, 2048, 128, 8, 768)]
MORE = [(32768, 4096, 128, 8, 512), (32768, 2048, 512, 10, 512), (65536, 2048, 64, 4, 1024), (64, 4096, 64, 8, 1024)]
CONTESTANTS = {"grouped": EXECUTORS["grouped"], "kernels": kernels}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Case:
    """One layer: T tokens of width D, each to K of E SwiGLU experts of F; skew is the exponent of Zipf's law."""

    T: int
    D: int
    E: int
    K: int
    F: int
    dtype: str = "bf16"
    skew: float = 0.0

    def flops(self, train: bool) -> float:
        """Of the products; 2 per multiply-add, the backward pass twice the forward."""
        return 6.0 * self.T * self.K * self.D * self.F * (3 if train else 1)

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} E={self.E} K={self.K} F={self.F} {self.dtype}" + (" Zipf" if self.skew else "")


def tensors(case: Case, device: str, seed: int = 0) -> tuple[Tensor, ExpertWeights, Tensor]:
    """Tokens, weights stored (out, in) as checkpoints have them, and the gradient of the output."""
    g, dtype = torch.Generator(device).manual_seed(seed), DTYPES[case.dtype]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, device=device, dtype=dtype).mul_(std)

    up = normal(case.E, 2 * case.F, case.D, std=case.D**-0.5).transpose(1, 2).requires_grad_()
    down = normal(case.E, case.D, case.F, std=case.F**-0.5).transpose(1, 2).requires_grad_()
    x_TD, slope_TD = normal(case.T, case.D).requires_grad_(), normal(case.T, case.D)
    return x_TD, ExpertWeights(up, down), slope_TD


def decide(case: Case, device: str, seed: int) -> tuple[Tensor, Tensor]:
    """(T, K) experts and weights; expert e is chosen in proportion to (e + 1)^-skew."""
    g = torch.Generator(device).manual_seed(seed)
    favour_E = -case.skew * torch.arange(1, case.E + 1, device=device).log()
    gumbel_TE = -torch.empty(case.T, case.E, device=device).exponential_(generator=g).log()
    score_TK, index_TK = (favour_E + gumbel_TE).topk(case.K)
    return index_TK, score_TK.softmax(-1)


def step(executor: Callable, case: Case, given: tuple, decision: tuple[Tensor, Tensor], train: bool) -> list[Tensor]:
    """The output, and the gradients of x, the combine weights, up and down when ``train``."""
    x_TD, weights, slope_TD = given
    index_TK, weight_TK = decision
    with torch.set_grad_enabled(train):
        weight_TK = weight_TK.detach().requires_grad_(train)
        y_TD = executor(x_TD, Routing.from_topk(index_TK, weight_TK, num_experts=case.E), weights)
    if not train:
        return [y_TD]
    leaves = [x_TD, weight_TK, weights.up_EDH, weights.down_EFD]
    return [y_TD.detach(), *torch.autograd.grad(y_TD, leaves, slope_TD.to(y_TD.dtype))]


def check(case: Case, given: tuple, decision: tuple[Tensor, Tensor]) -> dict[str, str]:
    """What is wrong with each contestant's values or gradients; nothing is timed that is wrong."""
    x_TD, weights, slope_TD = given
    wide = ExpertWeights(weights.up_EDH.detach().float(), weights.down_EFD.detach().float())
    wide.up_EDH.requires_grad_(), wide.down_EFD.requires_grad_()
    exact = step(reference, case, (x_TD.detach().float().requires_grad_(), wide, slope_TD), decision, train=True)
    limit, wrong = 1e-4 if case.dtype == "fp32" else 2e-2, {}
    for name, executor in CONTESTANTS.items():
        try:
            got = step(executor, case, given, decision, train=True)
        except Exception as error:
            wrong[name] = f"{type(error).__name__}: {error}"
            continue
        for what, one, other in zip(("y", "x", "weight_R", "up", "down"), got, exact, strict=True):
            error = float((one.float() - other).norm() / other.norm())
            if not error <= limit:
                wrong[name] = f"{what} is off by {error:.1e} of its norm"
    return wrong


def waits_for_the_device(executor: Callable, case: Case, given: tuple, decision: tuple[Tensor, Tensor]) -> bool:
    """Whether the host has to wait for the device, which a layer between other layers should never need."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(executor, case, given, decision, train=True)
    except RuntimeError:
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def timed(run: Callable[[], object]) -> float:
    """Milliseconds on the device."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def dense_tflops(dtype: torch.dtype, rounds: int, size: int = 8192) -> float:
    """The rate of torch's own product of two square matrices of random numbers."""
    a, b = (torch.randn(size, size, device="cuda", dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * size**3 / statistics.median(timed(lambda: a @ b) for _ in range(rounds)) / 1e9


def measure(case: Case, rounds: int) -> Iterator[dict[str, object]]:
    """One line per contestant and pass; a first line alone when something is wrong."""
    given, decisions = tensors(case, "cuda"), [decide(case, "cuda", seed) for seed in range(rounds + 3)]
    wrong = check(case, given, decisions[0])
    able = {name: executor for name, executor in CONTESTANTS.items() if name not in wrong}
    for name, problem in wrong.items():
        yield {"case": str(case), "name": name, "wrong": problem}
    dense = dense_tflops(DTYPES[case.dtype], rounds)
    for train in (False, True):
        times: dict[str, list[float]] = {name: [] for name in able}
        for number, decision in enumerate(decisions):
            for name, executor in able.items():
                ms = timed(lambda e=executor, d=decision, t=train: step(e, case, given, d, t))
                if number >= 3:
                    times[name].append(ms)
        for name, all_ms in times.items():
            rate = case.flops(train) / statistics.median(all_ms) / 1e9
            yield {
                "case": str(case),
                "pass": "forward+backward" if train else "forward",
                "name": name,
                "ms": [statistics.median(all_ms), min(all_ms), max(all_ms)],
                "tflops": rate,
                "share_of_dense": rate / dense,
                "dense_tflops": dense,
                "waits": waits_for_the_device(able[name], case, given, decisions[0]),
            }


def profile(case: Case) -> str:
    """Where a step of ours spends its time, kernel by kernel."""
    given, decision = tensors(case, "cuda"), decide(case, "cuda", 0)
    step(kernels, case, given, decision, train=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as watched:
        for _ in range(5):
            step(kernels, case, given, decision, train=True)
        torch.cuda.synchronize()
    return watched.key_averages().table(sort_by="cuda_time_total", row_limit=20)


def about() -> dict[str, str]:
    import triton

    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
    }


def line(found: dict) -> str:
    if "wrong" in found:
        return f"{found['case']:48s} {found['name']:8s} WRONG, not timed: {found['wrong']}"
    median, least, most = found["ms"]
    return (
        f"{found['case']:48s} {found['name']:8s} {found['pass']:16s} {median:8.3f} ms ({least:.3f}-{most:.3f}) "
        f"{found['tflops']:6.1f} TFLOP/s, {found['share_of_dense']:4.0%} of dense {found['dense_tflops']:.0f}"
        f"{', the host waits' if found['waits'] else ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the first shape with few rounds")
    parser.add_argument("--all", action="store_true", help="more shapes, and loads by Zipf's law")
    parser.add_argument("--profile", action="store_true", help="time by kernel as well")
    parser.add_argument("--shape", action="append", help="T,D,E,K,F; may be repeated")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--out", type=Path, help="a folder for a dated JSON file")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.gpu_layer needs a CUDA device, and torch finds none; benchmarks.moe_layer is for CPUs"
        )
    given = [tuple(map(int, shape.split(","))) for shape in options.shape or ()]
    shapes = given or (SHAPES[:1] if options.quick else SHAPES + (MORE if options.all else []))
    cases = [Case(*shape, dtype=options.dtype) for shape in shapes]
    cases += [dataclasses.replace(case, skew=1.5) for case in cases[:2]] if options.all else []
    facts, lines = about(), []
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    for case in cases:
        for found in measure(case, 5 if options.quick else options.rounds):
            lines.append(found)
            print(line(found), flush=True)
        if options.profile:
            print(profile(case), flush=True)
        torch.cuda.empty_cache()
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        path = options.out / f"gpu_layer-{facts['date']}-{facts['commit']}.json"
        path.write_text(json.dumps({"about": facts, "lines": lines}, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    if any("wrong" in found for found in lines):
        raise SystemExit("something was wrong; see above")


if __name__ == "__main__":
    main()
