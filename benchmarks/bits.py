"""What few bits cost: KL divergence, likeliest tokens and bits per byte of small sparse models that turnout trained.

    python -m benchmarks.bits [--seeds 100 101 102] [--out benchmarks/results]

A model of 8 experts, 2 a token, is trained for each seed on the text of the claims, and put in bf16. From there its
maps are rounded: 8 and 4 bits, every kind of codes, groups of 32 and 64, to nearest and by GPTQ, packed and run as
packed. Held-out text is read by both. The same is asked of the GGUF files that turnout writes, by llama.cpp itself
where benchmarks/llama-cpp has set it up.
"""

import argparse
import dataclasses
import importlib.util
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import llama_cpp
from benchmarks.tables import heading, provenance, write
from turnout.claims.taught import sample
from turnout.claims.trial import SEQ, small, text, trial
from turnout.measure import bits_per_byte
from turnout.measure.gap import logit_gap
from turnout.models import LM, MoEConfig
from turnout.models.gguf import to_gguf
from turnout.reshape.quantize import quantize
from turnout.train.data import Batch, windows

WIDTH, HIDDEN, EXPERTS, TOP_K = 128, 64, 8, 2
SCORED = 16_384  # held-out tokens
# Bars of int4 in groups of 64, as a model is first put in four bits: nats a token, and the share of bits per byte.
NATS, SHARE = 0.02, 0.01
BARRED = "int4, groups of 64, nearest"
GGUF = ("f32", "bf16", "q8_0", "q4_0")


@dataclasses.dataclass(frozen=True)
class Found:
    """One model against the one in bf16.

    Args:
        nats: mean KL(bf16 || it) a token.
        top1: how often the likeliest token is the same.
        bits: per byte of held-out text.
        share: those over the bits of bf16.
        size: bits a weight of the maps, or of everything in a file, with scales.
    """

    nats: float
    top1: float
    bits: float
    share: float
    size: float


@dataclasses.dataclass(frozen=True)
class Given:
    """Logits as a model gives them."""

    logits_BSV: Tensor
    routings: tuple[()] = ()


def taught(seed: int, steps: int) -> LM:
    """The model, trained; in fp32."""
    moe = MoEConfig(EXPERTS, TOP_K, HIDDEN, router_options={"renormalize": True})
    lm = LM(small(moe, hidden=2 * WIDTH, width=WIDTH), seed=seed)
    trial(lm, seed=seed, steps=steps, aux_weight=0.01)
    return lm.eval()


def held_out() -> list[Batch]:
    """The text that all are measured on."""
    return list(windows(text().held_out, batch=8, seq=SEQ, limit=SCORED))


@torch.no_grad()
def answers(lm: LM) -> list[Tensor]:
    """Its logits for every batch of that text."""
    return [lm(batch.id_BS).logits_BSV.float() for batch in held_out()]


def by_llama(path: Path) -> list[Tensor]:
    """Those of llama.cpp for a file."""
    batches = held_out()
    rows = iter(llama_cpp.logits(path, [row for batch in batches for row in batch.id_BS.tolist()]))
    return [torch.stack([torch.from_numpy(next(rows)) for _ in batch.id_BS]) for batch in batches]


def score(logits: list[Tensor]) -> float:
    """Bits per byte."""
    known = {}
    for batch, logits_BSV in zip(held_out(), logits, strict=True):
        for ids, real, one in zip(batch.id_BS, batch.target_BS >= 0, logits_BSV, strict=True):
            known[tuple(ids[real].tolist())] = one[real]

    def forward(id_BS: Tensor) -> Given:
        return Given(torch.stack([known[tuple(row)] for row in id_BS.tolist()]))

    lengths_V = torch.from_numpy(text().byte_length_V)
    return bits_per_byte(forward, held_out(), lengths_V, domains=text().domains).bits_per_byte


def compare(before: list[Tensor], after: list[Tensor], size: float) -> Found:
    """One against bf16."""
    nats, same, seen = 0.0, 0, 0
    for batch, a, b in zip(held_out(), before, after, strict=True):
        real = batch.target_BS >= 0
        gap = logit_gap(a[real][None], b[real][None])
        nats, same, seen = nats + float(gap.kl_N.sum()), same + int(gap.same_N.sum()), seen + len(gap.kl_N)
    bits = score(after)
    return Found(nats / seen, same / seen, bits, bits / score(before) - 1, size)


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """In words, and what ``quantize`` is told."""
    for codes, bits in (("int", 8), ("int", 4), ("float", 4), ("nf4", 4), ("quantile", 4)):
        for group in (64, 32) if bits == 4 else (None, 64):
            for method in ("nearest", "gptq"):
                name = f"{codes}{bits}" if codes == "int" else f"{codes}, 4 bits" if codes != "nf4" else codes
                where = f"groups of {group}" if group else "a scale a row"
                yield f"{name}, {where}, {method}", {"codes": codes, "bits": bits, "group": group, "method": method}


def measure(seed: int, steps: int) -> dict[str, Found]:
    """Everything of one model."""
    exact = taught(seed, steps)
    lm = LM(exact.config, seed=seed).eval()
    lm.load_state_dict(exact.state_dict())
    lm = lm.bfloat16()
    before, found = answers(lm), dict[str, Found]()
    found["fp32"] = compare(before, answers(exact), 32.0)
    found["bf16"] = compare(before, before, 16.0)
    for name, how in cases():
        packed, report = quantize(lm, batches=sample(seed), **how)
        found[name] = compare(before, answers(packed), report["bits_per_weight"])
    weights = sum(parameter.numel() for parameter in exact.parameters())
    with tempfile.TemporaryDirectory() as folder:
        for kind in GGUF if why_no_gguf() is None else ():
            path = Path(folder, f"{kind}.gguf")
            written = to_gguf(exact, path, kind=kind, tokenizer=False)  # pyrefly: ignore[bad-argument-type]
            found[f"GGUF {kind}, by llama.cpp"] = compare(before, by_llama(path), 8 * written.size_bytes / weights)
    return found


def why_no_gguf() -> str | None:
    """Why files are not measured; None where they are."""
    return llama_cpp.why_not() or ("no package gguf" if importlib.util.find_spec("gguf") is None else None)


def page(found: dict[int, dict[str, Found]], steps: int) -> list[str]:
    """The table, and the bars."""
    first = next(iter(found.values()))
    lines = [f"{len(found)} models of 2 layers, width {WIDTH}, {TOP_K} of {EXPERTS} experts of {HIDDEN} a token, after "
             f"{steps} steps of 1,024 tokens; {SCORED} held-out tokens, GPTQ by 4,096 others. Medians over the models, "
             "the most in brackets. Sizes: bits a weight of the maps, of the whole file for GGUF.",
             "",
             "| | size | KL, nats a token | likeliest token is the same | bits per byte | over bf16's |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for name in first:
        several = [one[name] for one in found.values()]
        nats, top1, bits, share = (
            [getattr(one, field) for one in several] for field in ("nats", "top1", "bits", "share")
        )
        lines.append(
            f"| {name} | {several[0].size:.2f} | {statistics.median(nats):.5f} ({max(nats):.5f}) | "
            f"{statistics.median(top1):.1%} | {statistics.median(bits):.4f} | {statistics.median(share):+.2%} "
            f"({max(share, key=abs):+.2%}) |"
        )
    if why := why_no_gguf():
        lines += ["", f"No GGUF files: {why}."]
    barred = [one[BARRED] for one in found.values()]
    worst, share = max(one.nats for one in barred), max((one.share for one in barred), key=abs)
    return [*lines, "", f"## bars: {BARRED}, against bf16", "",
            "| | bar | the most of all models | |", "|---|---|---|---|",
            f"| KL, nats a token | <= {NATS} | {worst:.4f} | {_said(worst <= NATS)} |",
            f"| bits per byte | within {SHARE:.0%} | {share:+.2%} | {_said(abs(share) <= SHARE)} |"]  # fmt: skip


def _said(met: bool) -> str:
    return "met" if met else "**missed**"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[100, 101, 102])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    about = provenance()
    found = {seed: measure(seed, options.steps) for seed in options.seeds}
    lines = [*heading("Few bits: what they cost", about), *page(found, options.steps)]
    print("\n".join(lines))
    raw = {seed: {name: dataclasses.asdict(one) for name, one in each.items()} for seed, each in found.items()}
    write(options.out, "bits", lines, about | {"steps": options.steps, "found": raw})


if __name__ == "__main__":
    main()
