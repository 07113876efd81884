"""Which policy a cache of experts should have: a recorded trace through all of them, beside a bound on all.

The trace is what turnout eval RUN --trace DIR records. Policies that learn do so from three quarters of its documents;
all are compared on the others. Belady's rule, which knows what comes, bounds the experts that any of them moves.

examples:
  turnout eval runs/x --trace trace              record which experts tokens take
  turnout cache trace                            a quarter, a half and three quarters of the experts held
  turnout cache trace --slots 8,16,32 --policy lru,lfru,expert_flow
  turnout cache trace --memory 2GB --expert-bytes 4.7MB --fetch-ms 1.2 --compute-ms 0.8
                                                 as much as fits, with the times of the machine it is for
  turnout cache runs/x                           the trace in a run's folder, with times that its model takes here
  turnout cache trace --save profile             what policies that learn go by, for turnout serve --expert-profile
  turnout cache trace --out folder               also a page, and the numbers as JSON
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from turnout.cli.early import check_folder, check_there, check_writable
from turnout.cli.experts import POLICIES
from turnout.errors import UsageError, word

if TYPE_CHECKING:
    from turnout.types import Report

HELP = "which policy a cache of experts should have, from a recorded trace"
_WHERE = "turnout cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout cache`` takes."""
    parser.add_argument(
        "trace", metavar="TRACE", help="a folder that turnout eval --trace wrote, or the run that holds one"
    )
    parser.add_argument("--slots", metavar="N,N,...", help="experts held in each layer (default 1/4, 1/2, 3/4 of them)")
    parser.add_argument("--memory", metavar="SIZE", help="what held experts may take, as 2GB, in the place of --slots")
    parser.add_argument(
        "--expert-bytes", metavar="SIZE", help="with --memory and without a model: of one expert, as 4.7MB"
    )
    parser.add_argument(
        "--pool", choices=("layer", "all", "both"), default="both", help="slots of each layer, or of all together"
    )
    parser.add_argument("--policy", metavar="NAME,...", help=f"of {', '.join(POLICIES)} (default all)")
    parser.add_argument(
        "--streams", type=int, default=1, metavar="N", help="documents decoded side by side (default 1)"
    )
    parser.add_argument(
        "--tokens", type=int, default=20_000, metavar="N", help="compared on, in whole documents (default 20000)"
    )
    parser.add_argument(
        "--model", metavar="RUN", help="the model, with which the times are measured (default: TRACE's run)"
    )
    parser.add_argument(
        "--fetch-ms", type=float, metavar="X", help="until an expert is there (default: measured, or 1)"
    )
    parser.add_argument("--compute-ms", type=float, metavar="X", help="of a layer's pass (default: measured, or 1)")
    parser.add_argument("--seed", type=int, default=0, help="of what is learnt (default 0)")
    parser.add_argument("--save", metavar="FILE", help="write what static, trace_matching and expert_flow learn here")
    parser.add_argument("--out", metavar="FOLDER", help="write cache.html and cache.json here")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compares, prints and writes."""
    check_there("TRACE", [arguments.trace], _WHERE)
    check_there("--model", [arguments.model], _WHERE)
    check_writable(_WHERE, save=arguments.save)
    _check_numbers(arguments)
    check_folder(arguments.out, _WHERE)
    slots = [] if arguments.slots is None else [_whole(part) for part in arguments.slots.split(",")]
    asked = (arguments.policy or ",".join(POLICIES)).replace("-", "_").split(",")
    names = dict.fromkeys(name.strip() for name in asked)
    from turnout.fields import byte_size
    from turnout.recipes.cache import cache_trace, trace_in
    from turnout.show.cache import cache_html
    from turnout.storage import write_whole

    trace, run_folder = trace_in(arguments.trace)
    each = arguments.expert_bytes
    each = None if each is None else byte_size(each, what="--expert-bytes", where=_WHERE)
    report = cache_trace(
        trace,
        slots=slots,
        shared={"layer": False, "all": True, "both": None}[arguments.pool],
        memory_bytes=None if arguments.memory is None else byte_size(arguments.memory, what="--memory", where=_WHERE),
        expert_bytes=each,
        policies=list(names),
        streams=arguments.streams,
        tokens=arguments.tokens,
        fetch_s=None if arguments.fetch_ms is None else arguments.fetch_ms / 1e3,
        compute_s=None if arguments.compute_ms is None else arguments.compute_ms / 1e3,
        model=arguments.model or run_folder,
        save=arguments.save,
        seed=arguments.seed,
    )
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        report.save(folder / "cache.json")
        write_whole(folder / "cache.html", cache_html(trace.name, report))
    print(report.to_json() if arguments.json else table(report))
    if arguments.out and not arguments.json:
        print(f"page: {Path(arguments.out) / 'cache.html'}")
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    for flag, least, words in (
        ("streams", 1, "be 1 or more"),
        ("tokens", 1, "be 1 or more"),
        ("fetch_ms", 1e-9, "be a finite number above 0"),
        ("compute_ms", 1e-9, "be a finite number above 0"),
        ("seed", 0, "be a whole number from 0 to 2^64 - 1"),
    ):
        got = getattr(arguments, flag)
        if got is not None and not least <= got < (1 << 64):
            fix = "leave it out for the default"
            raise UsageError(word(f"--{flag.replace('_', '-')}", got=got, allowed=words, where=_WHERE, fix=fix))


def _whole(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        fix = "write --slots 8,16,32"
        allowed = "be whole numbers of at least 1 with commas between"
        raise UsageError(word("--slots", got=repr(text), allowed=allowed, where=_WHERE, fix=fix))
    return int(text)


def table(report: "Report") -> str:
    """The report as text: for each pool and size a line a policy."""
    lines = [
        f"{report['documents']} documents, {report['steps']} passes, {report['layers']} layers of {report['experts']} "
        f"experts; one comes in {1e3 * report['fetch_s']:.3g} ms, a layer takes {1e3 * report['compute_s']:.3g} ms"
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
