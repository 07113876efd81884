"""Times servers under load: turnout serve, transformers serve and llama.cpp, with the same weights in the same bits.

    python -m benchmarks.serving --quick
    python -m benchmarks.serving [--models moe RUN ...] [--kinds fp32 bf16 int8 int4] [--peers ...] [--threads 1]
        [--rounds 3] [--work DIR] [--out benchmarks/results]

A model is one of benchmarks.decoding_models, or the folder of a run, whose model is exported for the others. All
servers are up at once and idle while one is asked, one after the other in shuffled order in each round; the load comes
from ``turnout.serve.load`` over HTTP, as users' does. Ratios are of the same round: of answers' tokens a second, and of
tokens for a second of the server's processor time, which what else the machine does cannot change much. Answers that
are cut, short or miscounted are failures, and a server with one of them is out.

  throughput   16 users, each of whom asks again when answered
  low load     one user: the time to the first token
  long prompts 4 users' texts go on while prompts of 2,048 tokens are read without a pause: their gaps; where the
               model has the positions

llama.cpp's wheel has no server; benchmarks/llama_server.py is a loop around it with continuous batching.
"""

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import decoding_models, llama_cpp
from benchmarks.serving_page import page
from benchmarks.serving_peers import SERVERS, Running, folder_to_serve, start
from benchmarks.tables import provenance, write
from turnout.serve.load import Answer, LengthMix, Target, Traffic
from turnout.serve.load.bench import calibrated
from turnout.serve.load.drive import Driven, closed_loop

__all__ = ["main"]

MANY, LONG = 16, 2048


class Load:
    """What is asked of one server.

    Args:
        server: which.
        quick: less of everything.
    """

    def __init__(self, server: Running, quick: bool) -> None:
        self.server, self.quick, self.target = server, quick, Target(server.url)
        self.cost = asyncio.run(calibrated(self.target, self._traffic("16", "4"), server.model, 600.0))[0]

    def throughput(self, seed: int) -> dict[str, float]:
        """Tokens a second with many users."""
        requests = MANY if self.quick else 2 * MANY
        driven, cpu_s = self._timed(
            self._closed(self._traffic("128", "32" if self.quick else "64"), requests, MANY, seed)
        )
        made = sum(answer.tokens for answer in driven.answers)
        wall_s = max(answer.ended_s for answer in driven.answers) - driven.begun_s
        return {"tokens_per_s": made / wall_s, "tokens_per_cpu_s": made / cpu_s, "client": driven.client_cpu_s / wall_s}

    def low_load(self, seed: int) -> dict[str, float]:
        """The time to the first token of one user."""
        driven, cpu_s = self._timed(self._closed(self._traffic("128", "8"), 4 if self.quick else 8, 1, seed))
        gaps = [gap for answer in driven.answers for gap in answer.gap_s]
        waits = [answer.ttft_s for answer in driven.answers]
        return {"ttft_s": statistics.median(waits), "itl_s": statistics.median(gaps), "cpu_s": cpu_s / len(waits)}

    def long_prompts(self, seed: int) -> dict[str, float]:
        """Gaps of texts under way while long prompts are read one after the other."""
        count = 1 if self.quick else 3

        async def both() -> tuple[Driven, Driven]:
            # Long enough for most of the reading; gaps after it do not count.
            tokens = "96" if self.quick else "256"
            short = asyncio.ensure_future(self._closed(self._traffic("64", tokens), 4, 4, seed))
            await asyncio.sleep(1.0)
            long = await self._closed(self._traffic(str(LONG), "4"), count, 1, seed + 1)
            return await short, long

        (short, long), _ = self._timed(both())
        begun, ended = long.answers[0].sent_s, long.answers[-1].ended_s
        gaps = [
            after - before
            for answer in short.answers
            for before, after in zip(answer.piece_s, answer.piece_s[1:], strict=False)
            if begun <= after and before <= ended
        ]
        median, p99 = np.percentile(gaps, (50, 99)) if gaps else (float("nan"), float("nan"))
        wait = statistics.median(answer.ttft_s for answer in long.answers)
        return {"itl_s": float(median), "p99_s": float(p99), "gaps": len(gaps), "long_ttft_s": wait}

    def _traffic(self, prompt: str, output: str) -> Traffic:
        cost = getattr(self, "cost", None)
        each, overhead = (cost.tokens_per_word, cost.overhead_tokens) if cost else (1.0, 0.0)
        mix = LengthMix.parse(prompt), LengthMix.parse(output)
        return Traffic(*mix, tokens_per_word=each, overhead_tokens=overhead)

    async def _closed(self, traffic: Traffic, requests: int, users: int, seed: int) -> Driven:
        asked = traffic.draw(requests, self.target, self.server.model, seed=seed)
        return await closed_loop(self.target, asked, users, timeout_s=900.0, fixed=True)

    def _timed(self, work: Coroutine[Any, Any, Any]) -> tuple[Any, float]:
        before = self.server.cpu_s()
        done = asyncio.run(work)
        parts: Sequence[Driven] = done if isinstance(done, tuple) else (done,)
        failed: list[Answer] = [one for part in parts for one in part.answers if one.error]
        if failed:
            raise RuntimeError(f"{self.server.name}: {len(failed)} failed: {failed[0].error}: {failed[0].message}")
        return done, self.server.cpu_s() - before


def measure(name: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model in one kind of bits."""
    source, folder, gguf = _prepared(name, kind, options)
    peers = [one for one in options.peers if one != "transformers" or kind in ("fp32", "bf16")]
    found: dict[str, Any] = {"model": name, "kind": kind, "peers": {one: [] for one in peers}, "failed": {}}
    jobs, found["left_out"] = jobs_of(positions(folder), options.jobs)
    with contextlib.ExitStack() as stack:
        loads = dict[str, Load]()
        for one in peers:
            of = source / kind if one == "turnout" and kind in ("int8", "int4") else folder
            room = min(LONG + 512, positions(folder))
            running = start(one, of, gguf, kind, threads=options.threads, streams=MANY + 4, room=room)
            stack.callback(running.stop)
            loads[one] = Load(running, options.quick)
            found.setdefault("resident_bytes", {})[one] = running.resident_bytes()
        for number in range(-1, options.rounds):  # the first warms them up
            for one in random.Random(number).sample(peers, len(peers)):
                if one in found["failed"]:
                    continue
                round_ = dict[str, Any]()
                for job in jobs:
                    begun = time.monotonic()
                    try:
                        round_[job] = getattr(loads[one], job)(100 * (number + 2))
                    except RuntimeError as error:
                        found["failed"][one] = str(error)
                        print(f"{name}, {kind}, {one}, {job}: {error}", file=sys.stderr, flush=True)
                        break
                    took = time.monotonic() - begun
                    print(f"{name}, {kind}, round {number}, {one}, {job}: {took:.0f} s", file=sys.stderr, flush=True)
                if number >= 0 and one not in found["failed"]:
                    found["peers"][one].append(round_)
    return found


def positions(folder: Path) -> int:
    """How many a model has, by its configuration."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int(config["max_position_embeddings"])


def jobs_of(room: int, wanted: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Which of them a model of so many positions can do, and why not the others."""
    if room >= LONG + 4:
        return list(wanted), {}
    why = f"prompts of {LONG:,} tokens do not fit into the model's {room:,} positions"
    return [job for job in wanted if job != "long_prompts"], {job: why for job in wanted if job == "long_prompts"}


def _prepared(name: str, kind: str, options: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The model's folder, what is served of it, and the file of llama.cpp."""
    if name in decoding_models.SHAPES:
        source = options.work / name
        decoding_models.prepare(name, source, (kind,), gguf="llama.cpp" in options.peers)
        place = options.work / "served" / name
        folder = folder_to_serve(source, kind, place)
        if kind in ("int8", "int4"):
            for file in ("tokenizer.json", "tokenizer_config.json"):
                (source / kind / file).write_bytes((folder / file).read_bytes())
        return source, folder, source / f"{kind}.gguf"
    return _exported(Path(name), kind, options)


def _exported(run: Path, kind: str, options: argparse.Namespace) -> tuple[Path, Path, Path]:
    """The model of a run, as a folder of transformers and a file of llama.cpp."""
    import torch

    from turnout.models import checkpoint
    from turnout.models.gguf import to_gguf
    from turnout.recipes.calibration import find_tokenizer
    from turnout.recipes.models import opened

    if kind not in ("fp32", "bf16"):
        raise RuntimeError(f"a run is served in fp32 and bf16, not in {kind}")
    place = options.work / "served" / f"run-{run.resolve().parent.name}-{run.name}"  # a shape may have the same name
    place.mkdir(parents=True, exist_ok=True)
    found = opened(str(run), "benchmarks.serving", "cpu")
    lm = found.lm.to({"fp32": torch.float32, "bf16": torch.bfloat16}[kind])
    folder, gguf = place / kind, place / f"{kind}.gguf"
    if not folder.exists():
        checkpoint.to_hf(lm, folder)
        (folder / "tokenizer.json").write_bytes(find_tokenizer(found.folder, where="benchmarks.serving").read_bytes())
        for file in ("config.json", "generation_config.json"):  # no token ends a text
            if (folder / file).exists():
                said = json.loads((folder / file).read_text(encoding="utf-8"))
                (folder / file).write_text(json.dumps(said | {"eos_token_id": None}), encoding="utf-8")
        about = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 4096}
        (folder / "tokenizer_config.json").write_text(json.dumps(about), encoding="utf-8")
    if "llama.cpp" in options.peers and not gguf.exists():
        to_gguf(lm, gguf, kind=decoding_models.BITS[kind], tokenizer=False)  # pyrefly: ignore
    return place, folder, gguf


def main(arguments: list[str] | None = None) -> None:
    """Measures, and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one model, one round, shorter answers")
    parser.add_argument("--models", nargs="+", default=["moe"])
    parser.add_argument("--kinds", nargs="+", choices=decoding_models.KINDS, default=["fp32"])
    parser.add_argument("--peers", nargs="+", choices=SERVERS, default=[*SERVERS])
    parser.add_argument("--jobs", nargs="+", default=["throughput", "low_load", "long_prompts"])
    parser.add_argument(
        "--threads", type=int, default=1, help="of each server (default 1: the client has the other core)"
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--work", type=Path, help="keep the models there")
    parser.add_argument("--out", type=Path, help="folder for a dated page (markdown) and all times (JSON)")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 3)
    if "llama.cpp" in options.peers and (why := llama_cpp.why_not()):
        parser.error(f"{why}; or leave it out of --peers")
    with tempfile.TemporaryDirectory() as folder:
        options.work = (options.work or Path(folder)).absolute()
        pieces = [measure(name, kind, options) for name in options.models for kind in options.kinds]
    about = provenance() | {"threads_of_servers": options.threads, "rounds": options.rounds, "quick": options.quick}
    record = {"about": json.loads(json.dumps(about)), "pieces": pieces}
    lines = page(record)
    print("\n".join(lines))
    write(options.out, "serving", lines, record)


if __name__ == "__main__":
    main()
