"""Times decoding on the CPU: turnout's LM, transformers as it comes and adopted, and llama.cpp, with the same weights.

    python -m benchmarks.decoding --quick
    python -m benchmarks.decoding [--shapes moe olmoe dense] [--kinds fp32 bf16 int8 int4] [--threads 1 2]
        [--streams 1 4 16] [--context 128 2048] [--rounds 5] [--work DIR] [--out benchmarks/results]
        [--docs docs/performance.md]

Each runs in a process of its own and they take turns in shuffled order in every round, each for a few tokens, so that
what else the machine does meets all of them; ratios are of the same round. So does the limit: a sweep over the bytes
that a step must read, or the bare products of a prompt. Before anything is timed each one's logits, by the very calls
that are timed, are compared with those of transformers in fp32: no times for wrong answers. llama.cpp takes part where
benchmarks/llama-cpp has set it up.

A piece is one model in one kind with so many threads, in processes of its own; ``--work`` keeps what was measured of
each, and a run that was cut goes on where it was. A piece that fails is named, and the others go on.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import decoding_page, few_rows
from benchmarks.decoding_models import KINDS, SHAPES
from benchmarks.decoding_piece import PEERS, piece
from benchmarks.tables import provenance, write

__all__ = ["main", "run"]

# How benchmarks.few_rows calls what its experts are held in, by kind.
ALONE = {"fp32": "fp32", "bf16": "bf16", "int8": "int8 a row", "int4": "int4 of 64"}
# What two pieces must agree in to stand on one page; the commit may be another where that is asked for.
SAME = ("processor", "cores", "torch", "transformers", "executors", "rounds", "tokens", "prefill", "streams", "context",
        "peers")  # fmt: skip


def alone(shape: str, options: argparse.Namespace) -> dict[str, Any]:
    """The experts of a model by themselves, over one sweep of their weights."""
    keys = SHAPES[shape].keys
    hidden = keys.get("moe_intermediate_size", keys["intermediate_size"])
    sizes = few_rows.Shape(keys["num_experts"], keys["num_experts_per_tok"], keys["hidden_size"], hidden)
    found = []
    for kind in options.kinds:
        with torch.no_grad():
            timed = few_rows.measure(ALONE[kind], sizes, options.rounds)
        for rows, bar in zip(few_rows.ROWS, few_rows.BARS[ALONE[kind]], strict=True):
            told = {
                "shape": shape,
                "form": ALONE[kind],
                "rows": rows,
                "bar": bar,
                "ratio": timed["ratios"][f"M={rows}"],
            }
            found.append(told | {"sweep_gb_s": timed["sweep_gb_s"]})
    return {"alone": found}


def pieces(options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """The name of each, and what measures it."""
    for shape in options.shapes:
        for kind in options.kinds:
            for threads in options.threads:
                said = f"{shape}, {kind}, {threads} thread{'s' * (threads > 1)}"
                about = {"shape": shape, "kind": kind, "threads": threads}
                yield said, lambda about=about: about | piece(**about, options=options)
        if "turnout" in options.peers and SHAPES[shape].has_experts:
            yield f"{shape}, experts alone, {' '.join(options.kinds)}", lambda shape=shape: alone(shape, options)


def kept(path: Path, about: dict[str, Any], options: argparse.Namespace) -> dict[str, Any] | None:
    """What was measured of a piece by an earlier run that may stand beside this one's."""
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    same = (*SAME, *(() if options.other_commits else ("commit",)))
    return found if all(found["about"].get(name) == about[name] for name in same) else None


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The numbers of all pieces, those that are there already as they are."""
    torch.set_num_threads(1)
    told = {
        name: getattr(options, name) for name in ("rounds", "quick", "tokens", "prefill", "streams", "context", "peers")
    }
    about = json.loads(json.dumps(provenance() | told))
    record: dict[str, Any] = {"about": about, "pieces": [], "alone": [], "failed": []}
    folder = options.work / "pieces"
    folder.mkdir(exist_ok=True)
    for name, measure in pieces(options):
        path, start = folder / f"{name.replace(', ', '-').replace(' ', '_')}.json", time.perf_counter()
        found = kept(path, about, options)
        if found is None:
            try:
                found = {"about": about, "measured": measure()}
            except (Exception, SystemExit) as error:  # the others are worth measuring all the same
                record["failed"].append({"piece": name, "why": f"{type(error).__name__}: {error}"})
                print(f"{name}: failed after {time.perf_counter() - start:.0f} s\n{error}", file=sys.stderr, flush=True)
                continue
            path.with_suffix(".part").write_text(json.dumps(found), encoding="utf-8")
            path.with_suffix(".part").replace(path)
            print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        add(record, found["measured"], found["about"]["commit"])
    return record


def add(record: dict[str, Any], measured: dict[str, Any], commit: str) -> None:
    """Puts a piece into the record."""
    if commit not in record["about"]["commit"]:
        record["about"]["commit"] += f", {commit}"
    if "cases" in measured:
        record["pieces"].append(measured)
        print("\n".join(decoding_page.rows(measured)), flush=True)
    record["alone"] += measured.get("alone", [])


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, one thread, few rounds: about three minutes")
    parser.add_argument("--shapes", nargs="+", choices=[*SHAPES])
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[*PEERS])
    parser.add_argument("--threads", nargs="+", type=int)
    parser.add_argument("--streams", nargs="+", type=int)
    parser.add_argument("--context", nargs="+", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--tokens", type=int, default=16, help="of a turn, over all streams, at least 4 each")
    parser.add_argument("--prefill", type=int, default=512)
    parser.add_argument("--work", type=Path, help="keep the models and what was measured there, and go on from it")
    parser.add_argument("--other-commits", action="store_true", help="go on from what other commits measured, too")
    parser.add_argument("--out", type=Path, help="folder for a dated page (markdown) and all times (JSON)")
    parser.add_argument("--docs", type=Path, help="the document whose section is written anew; needs --out")
    options = parser.parse_args(arguments)
    if options.docs and not options.out:
        parser.error("--docs refers to a page: say --out too")
    quick = options.quick
    options.shapes = options.shapes or (["moe"] if quick else ["moe", "olmoe", "dense"])
    options.threads = options.threads or ([1] if quick else [1, 2])
    options.streams = options.streams or ([1, 16] if quick else [1, 4, 16])
    options.context = options.context or ([128] if quick else [128, 2048])
    options.rounds = options.rounds or (3 if quick else 5)
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parsed(arguments)
    with tempfile.TemporaryDirectory() as folder:
        options.work = (options.work or Path(folder)).absolute()
        options.work.mkdir(parents=True, exist_ok=True)
        record = run(options)
    lines = decoding_page.page(record)
    print("\n".join(lines[lines.index("## bars") :]), flush=True)
    write(options.out, "decoding", lines, record)
    if options.docs:
        newest = max(options.out.glob("decoding-*.md"))
        page = Path(os.path.relpath(newest, options.docs.parent)).as_posix()
        text = options.docs.read_text(encoding="utf-8")
        options.docs.write_text(decoding_page.into(text, decoding_page.section(record, page)), encoding="utf-8")
    if record["failed"]:
        raise SystemExit(
            f"{len(record['failed'])} pieces failed: {'; '.join(one['piece'] for one in record['failed'])}"
        )


if __name__ == "__main__":
    main()
