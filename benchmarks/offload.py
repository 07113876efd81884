"""Times decoding with some experts in memory and the others in files that the system keeps in its own memory.

    python -m benchmarks.offload --quick
    python -m benchmarks.offload [--kinds fp32 bf16 int8 int4] [--shares 0.5 0.25] [--policies lru lfu expert_flow]
        [--noise 0.35] [--stay 0.98] [--tokens 64] [--rounds 5] [--threads 1] [--out benchmarks/results]

A Qwen3-MoE of 216 M parameters (8 layers, 32 experts of which a token takes 4) reads one text, token by token, whose
tokens are given: the same for all. A model of random weights has no locality, so it is planted: tokens are of 32
topics, a token's embedding is its topic's and a share of its own (``--noise``), and a text stays with a topic from
token to token with probability ``--stay``. What locality that is the page says: how many of a token's experts the token
before took too, and what the least recently used of a quarter of the slots hit. Of a trained model with 512 experts
llama.cpp's issue 27861 reports 0.81 for that; the defaults are below it.

The model with all experts in memory and each policy take turns in shuffled order in every round; ratios are of the same
round. Before anything is timed each one's scores are compared with those of the former: to the bit, or no times.
"""

import argparse
import dataclasses
import functools
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tables import heading, provenance, spread, write
from turnout.decide.device import cache
from turnout.decide.device.cache.named import NAMES
from turnout.models import LM, LMConfig, MoEConfig
from turnout.models.checkpoint import from_hf, load, load_offloaded, save, to_hf
from turnout.models.decoding import Decoder, decoding_path
from turnout.reshape import quantize
from turnout.types import Accesses

__all__ = ["Text", "main", "planted", "run", "text"]

BAR = 0.6  # of the speed with all experts in memory, half of them held
BITS = {"int8": 8, "int4": 4}
CONFIG = LMConfig(
    vocab_size=8192,
    width=512,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=64,
    hidden=512,
    max_seq=4096,
    qk_norm="head",
    moe=MoEConfig(num_experts=32, top_k=4, hidden=512, router="TopK", router_options={"renormalize": True}),
)
TOPICS = 32


@dataclasses.dataclass(frozen=True)
class Text:
    """Tokens that follow each other, and how local their topics are."""

    ids: tuple[int, ...]
    switches: int


def planted(config: LMConfig, noise: float, topics: int, seed: int = 0) -> LM:
    """A model whose embeddings are their topics', token t of topic t mod ``topics``, and by that share their own."""
    lm, generator = LM(config, seed=seed).eval(), torch.Generator().manual_seed(seed + 1)
    center_GD = torch.randn(topics, config.width, generator=generator)
    own_VD = torch.randn(config.vocab_size, config.width, generator=generator)
    topic_V = torch.arange(config.vocab_size) % topics
    with torch.no_grad():
        lm.embedding.copy_((1 - noise) ** 0.5 * center_GD[topic_V] + noise**0.5 * own_VD)
    return lm


def text(count: int, vocab: int, stay: float, topics: int, seed: int = 0) -> Text:
    """So many tokens of topics that stay from one to the next with that probability."""
    draw, topic, found, switches = random.Random(seed), 0, [], 0
    for _ in range(count):
        if draw.random() >= stay:
            topic, switches = draw.randrange(topics), switches + 1
        found.append(draw.randrange(vocab // topics) * topics + topic)
    return Text(tuple(found), switches)


def locality(lm: LM, ids: tuple[int, ...]) -> float:
    """The share of a token's experts that the token before took too, over all layers."""
    with torch.no_grad():
        routings = lm(torch.tensor([ids[:512]])).routings
    shares = []
    for routing in routings:
        taken_TE = torch.zeros(routing.num_tokens, routing.num_experts, dtype=torch.bool)
        taken_TE[routing.token_R, routing.expert_R] = True
        shares.append((taken_TE[1:] & taken_TE[:-1]).sum().item() / taken_TE[1:].sum().item())
    return sum(shares) / len(shares)


def learnt_of(lm: LM, options: argparse.Namespace) -> cache.Learnt:
    """What policies learn from other texts of the same kind: of another seed, 16 of 64 tokens each."""
    texts = [text(64, lm.config.vocab_size, options.stay, TOPICS, seed=1 + n).ids for n in range(16)]
    used_SLE = np.zeros((64 * len(texts), lm.config.layers, lm.routers[0].num_experts), bool)
    with torch.no_grad():
        for n, ids in enumerate(texts):
            for layer, routing in enumerate(lm(torch.tensor([ids])).routings):
                used_SLE[64 * n + routing.token_R.numpy(), layer, routing.expert_R.numpy()] = True
    tokens = np.concatenate([np.array(ids) for ids in texts])
    return cache.Learnt.of(Accesses.of_used(used_SLE, np.repeat(np.arange(len(texts)), 64), tokens), seed=0)


class Mode:
    """One way to hold the experts, and its text so far."""

    def __init__(self, name: str, lm: LM, ids: tuple[int, ...]) -> None:
        self.name, self.lm, self._ids, self._at = name, lm, ids, 64
        self._decoder = Decoder(lm, 1, len(ids))
        self.score = self._decoder.prefill(torch.tensor([ids[:64]])).clone()
        assert decoding_path(lm).startswith("one compiled step"), decoding_path(lm)

    def go(self, tokens: int) -> tuple[float, float]:
        """Reads that many more; seconds of the clock, and of all the process's threads."""
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(tokens):
            self.score = self._decoder.step(torch.tensor([self._ids[self._at]]))
            self._at += 1
        return time.perf_counter() - start, time.process_time() - cpu


def measure(kind: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All modes of one kind of weights."""
    count = 64 + options.tokens * (options.rounds + 1)
    said = text(count, CONFIG.vocab_size, options.stay, TOPICS)
    lm = planted(dataclasses.replace(CONFIG, layers=options.layers), options.noise, TOPICS)
    near = locality(lm, said.ids)
    lm = (
        quantize(lm, bits=BITS[kind])[0] if kind in BITS else lm.to(torch.bfloat16 if kind == "bf16" else torch.float32)
    )
    # As they lie in slots: folders of turnout have whole matrices the other way round, and are turned on the way.
    (save if kind in BITS else lambda path, model: to_hf(model, path))(folder / kind, lm)
    del lm
    full = (load if kind in BITS else from_hf)(folder / kind)
    learnt = learnt_of(full, options)
    modes = [Mode("all in memory", full, said.ids)]
    size = sum(tensor.nbytes for name, tensor in full.state_dict().items() if ".bank." in name)
    for share in options.shares:
        for policy in options.policies:
            named, _, pool = policy.partition("+")
            made = functools.partial(cache.named_policy, named, learnt=learnt)
            how = {"policy": made, "shared": pool == "pool", "threads": options.readers}
            few = load_offloaded(folder / kind, expert_memory=int(size * share * 1.0001), **how)
            modes.append(Mode(f"{share:g} by {policy}", few, said.ids))
    return {"kind": kind, "locality": near, "switches": said.switches, "modes": timed(modes, options)}


def timed(modes: list[Mode], options: argparse.Namespace) -> list[dict[str, Any]]:
    """What each took, and its ratio to the first in the same round."""
    found: dict[str, list[tuple[float, float]]] = {mode.name: [] for mode in modes}
    order, draw = list(modes), random.Random(0)
    for number in range(options.rounds + 1):
        draw.shuffle(order)
        spent = {mode.name: mode.go(options.tokens) for mode in order}
        wrong = [mode.name for mode in modes if not torch.equal(mode.score, modes[0].score)]
        if wrong:
            raise SystemExit(f"no times for wrong answers: {wrong[0]} has other scores than {modes[0].name}")
        if number:  # the first warms up
            for name, seconds in spent.items():
                found[name].append(seconds)
        else:
            before = {mode.name: mode.lm.experts and mode.lm.experts.stats() for mode in modes}
    base, rows = found[modes[0].name], []
    for mode in modes:
        wall, cpu = (
            [one[which] / other[which] for one, other in zip(base, found[mode.name], strict=True)] for which in (0, 1)
        )
        row: dict[str, Any] = {"mode": mode.name, "speed": wall, "cpu_speed": cpu}
        row["ms"] = [1e3 * one[0] / options.tokens for one in found[mode.name]]
        if mode.lm.experts is not None:
            now, then = mode.lm.experts.stats(), before[mode.name]
            assert then
            asked = now.hits + now.misses - then.hits - then.misses
            row |= {"ahead": now.prefetched - then.prefetched, "ahead_used": now.prefetched_used - then.prefetched_used,
                    "loads": now.misses - then.misses + now.prefetched - then.prefetched}  # fmt: skip
            row |= {"hit_rate": (now.hits - then.hits) / asked, "waits_s": now.waits_s - then.waits_s,
                    "gb": (now.fetched_bytes - then.fetched_bytes) / 1e9, "slots": now.slots}  # fmt: skip
            mode.lm.experts.close()
        rows.append(row)
    return rows


def page(record: dict[str, Any]) -> list[str]:
    """The record as a page."""
    lines = heading("Experts in files", record["about"])
    options = record["options"]
    for of in record["kinds"]:
        lines += [
            f"## {of['kind']}", "",
            f"A token's experts are {of['locality']:.0%} those of the token before (noise {options['noise']}, stay "
            f"{options['stay']}, {of['switches']} changes of topic). Speed is of all experts in memory, same round: "
            f"median (least-most) of {options['rounds']} rounds of {options['tokens']} tokens; the same bits.",
            "", "| experts | ms a token | speed | speed by CPU time | hits | loads | ahead, used | waited | read |",
            "|---|---|---|---|---|---|---|---|---|",
        ]  # fmt: skip
        for row in of["modes"]:
            more = (
                [
                    f"{row['hit_rate']:.1%}",
                    f"{row['loads']:,}",
                    f"{row['ahead']:,}, {row['ahead_used']:,}",
                    f"{row['waits_s']:.2f} s",
                    f"{row['gb']:.2f} GB",
                ]
                if "gb" in row
                else [""] * 5
            )
            cells = [row["mode"], spread(row["ms"]), spread(row["speed"]), spread(row["cpu_speed"]), *more]
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Measures all kinds."""
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(dir=options.work) as folder, torch.no_grad():
        kinds = [measure(kind, options, Path(folder)) for kind in options.kinds]
    told = {name: value for name, value in vars(options).items() if name not in ("out", "work")}
    return {"about": provenance(), "options": told, "kinds": kinds}


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16", "int8", "int4"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5])
    parser.add_argument("--policies", nargs="+", default=["lru", "lru+pool", *NAMES[1:-1]])
    parser.add_argument("--noise", type=float, default=0.35)
    parser.add_argument("--stay", type=float, default=0.98)
    parser.add_argument("--layers", type=int, default=CONFIG.layers)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--readers", type=int, default=1, help="threads that read experts")
    parser.add_argument("--quick", action="store_true", help="two layers and few tokens: whether it works")
    parser.add_argument("--work", help="where models are written (default: the system's folder for what is temporary)")
    parser.add_argument("--out", type=Path, help="the folder that the page goes to")
    options = parser.parse_args(arguments)
    if options.quick:
        options.layers, options.tokens, options.rounds, options.kinds = 2, 8, 1, ["fp32"]
    return options


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints and writes."""
    options = parsed(arguments)
    record = run(options)
    lines = page(record)
    print("\n".join(lines))
    write(options.out, "offload", lines, record)


if __name__ == "__main__":
    main()
