"""Which policy a cache of experts should have: a recorded trace through all of them, beside a bound on all.

The trace is what turnout eval RUN --trace DIR records. Policies that learn do so from three quarters of its documents;
all are compared on the others. Belady's rule, which knows what comes, bounds the experts that any of them moves.

examples:
  turnout eval runs/x --trace trace              record which experts tokens take
  turnout cache trace                            a quarter, a half and three quarters of the experts held
  turnout cache trace --slots 8,16,32 --policy lru,lfru,expert_flow
  turnout cache trace --memory 2GB --expert-bytes 4.7MB --fetch-ms 1.2 --compute-ms 0.8
                                                 as much as fits, with the times of the machine it is for
  turnout cache trace --out folder               also a page, and the numbers as JSON
"""

import argparse
from typing import TYPE_CHECKING

from turnout.cli.early import check_seed, check_there, check_writable

if TYPE_CHECKING:
    from turnout.types import Report

HELP = "which policy a cache of experts should have, from a recorded trace"
# turnout.recipes.cache.POLICIES, which would load torch; a test compares them.
POLICIES = ("lru", "lfu", "lfru", "least_stale", "static", "trace_matching", "expert_flow", "pre_gated")
_UNITS = {"KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40, "B": 1}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout cache`` takes."""
    parser.add_argument("trace", metavar="TRACE", help="a folder that turnout eval --trace wrote")
    parser.add_argument("--slots", metavar="N,N,...", help="experts held in each layer (default 1/4, 1/2, 3/4 of them)")
    parser.add_argument("--memory", metavar="BYTES", help="what held experts may take, as 2GB, in the place of --slots")
    parser.add_argument("--expert-bytes", metavar="BYTES", help="with --memory: the weights of one expert, as 4.7MB")
    parser.add_argument(
        "--pool", choices=("layer", "all", "both"), default="both", help="slots of each layer, or of all together"
    )
    parser.add_argument("--policy", metavar="NAME,...", help=f"of {', '.join(POLICIES)} (default all)")
    parser.add_argument(
        "--streams", type=int, default=1, metavar="N", help="documents decoded side by side (default 1)"
    )
    parser.add_argument("--tokens", type=int, default=20_000, metavar="N", help="compared on at most (default 20000)")
    parser.add_argument("--fetch-ms", type=float, default=1.0, metavar="X", help="until an expert is there (default 1)")
    parser.add_argument("--compute-ms", type=float, default=1.0, metavar="X", help="of a layer's pass (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of what is learnt (default 0)")
    parser.add_argument("--out", metavar="FOLDER", help="write cache.html and cache.json here")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compares, prints and writes."""
    check_there("TRACE", [arguments.trace], "turnout cache")
    check_seed(arguments.seed, "turnout cache")
    check_writable("turnout cache", out=arguments.out)
    slots = [_whole(part) for part in arguments.slots.split(",")] if arguments.slots else []
    memory, bytes_ = (_bytes(f"--{n.replace('_', '-')}", getattr(arguments, n)) for n in ("memory", "expert_bytes"))
    from pathlib import Path

    from turnout.recipes.cache import cache_trace
    from turnout.show.cache import cache_html
    from turnout.storage import write_whole

    report = cache_trace(
        arguments.trace,
        slots=slots,
        shared={"layer": False, "all": True, "both": None}[arguments.pool],
        memory_bytes=memory,
        expert_bytes=bytes_,
        policies=arguments.policy.split(",") if arguments.policy else POLICIES,
        streams=arguments.streams,
        tokens=arguments.tokens,
        fetch_s=arguments.fetch_ms / 1e3,
        compute_s=arguments.compute_ms / 1e3,
        seed=arguments.seed,
    )
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        report.save(folder / "cache.json")
        write_whole(folder / "cache.html", cache_html(Path(arguments.trace).name, report))
    print(report.to_json() if arguments.json else table(report))
    if arguments.out and not arguments.json:
        print(f"page: {Path(arguments.out) / 'cache.html'}")
    return 0


def _whole(text: str) -> int:
    from turnout.errors import UsageError, word

    if not text.strip().isdecimal() or int(text) < 1:
        fix = "write --slots 8,16,32"
        allowed = "be whole numbers of at least 1 with commas between"
        raise UsageError(word("--slots", got=text, allowed=allowed, where="turnout cache", fix=fix))
    return int(text)


def _bytes(what: str, text: str | None) -> float | None:
    from turnout.errors import UsageError, word

    if text is None:
        return None
    unit = next((unit for unit in _UNITS if text.upper().endswith(unit)), "")
    try:
        found = float(text[: len(text) - len(unit)]) * _UNITS.get(unit, 1)
    except ValueError:
        found = 0.0
    if not 0 < found < float("inf"):
        allowed = "be a number of bytes above 0, with KB, MB, GB or KiB, MiB, GiB behind it"
        raise UsageError(word(what, got=text, allowed=allowed, where="turnout cache", fix=f"write {what} 2GB"))
    return found


def table(report: "Report") -> str:
    """The report as text: for each pool and size a line a policy."""
    lines = [
        f"{report['documents']} documents, {report['steps']} passes, {report['layers']} layers of {report['experts']} "
        f"experts; one comes in {1e3 * report['fetch_s']:g} ms, a layer takes {1e3 * report['compute_s']:g} ms"
    ]
    for told in report["recommended"]:
        here = [r for r in report["rows"] if (r["pool"], r["slots"]) == (told["pool"], told["slots"])]
        lines.append(f"\n{told['slots']} slots of {told['pool']}")
        lines.append(f"  {'':16}{'hits':>8}{'not moved':>11}{'early, used':>13}{'ms a pass':>11}{'waiting':>9}")
        for row in here:
            right = "-" if row["prefetch_accuracy"] is None else f"{row['prefetch_accuracy']:.1%}"
            lines.append(
                f"  {row['policy']:16}{row['hit_rate']:>8.1%}{row['moved_rate']:>11.1%}{right:>13}"
                f"{1e3 * row['seconds'] / report['steps']:>11.3f}{row['waited_s'] / row['seconds']:>9.1%}"
            )
        lines.append(f"  take {told['policy']}: {told['reason']}")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
