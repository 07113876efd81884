"""Reproduce published results small, each with its mechanism on and off, over five seeds.

examples:
  turnout verify                             list the claims
  turnout verify loss_free                   run one: two and a half minutes on one core at most
  turnout verify loss_free --seeds 0,1,2     on other seeds than the published ones
  turnout verify --family scale              run those of one family
  turnout verify --all --jobs 2 --json table.json
                                             run all: 40 minutes on two cores
  turnout verify --all --jobs 2 --json table.json --resume
                                             go on where that was stopped
"""

import argparse
import sys

HELP = "see published results reproduced against their ablations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout verify`` takes."""
    parser.add_argument("names", nargs="*", metavar="CLAIM", help="the claims to run; without one, they are listed")
    parser.add_argument("--all", action="store_true", help="run every claim")
    parser.add_argument("--family", metavar="NAME", help="run every claim of one family: moe, scale, serve")
    parser.add_argument("--seeds", metavar="N,N,N", help="1 to 10 seeds; without it, the published ones")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once, one thread each (1)")
    parser.add_argument("--json", metavar="FILE", help="also write the results here, after each claim")
    parser.add_argument("--resume", action="store_true", help="keep the results in --json FILE and run the others")
    parser.add_argument(
        "--device", default="auto", metavar="DEVICE", help="auto or cpu: claims are measured on the CPU alone"
    )
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Runs the claims; the exit code is 1 when one does not hold."""
    if arguments.names or arguments.all or arguments.family:
        _check(arguments)  # before torch loads
    from turnout import claims
    from turnout.claims.table import Table, measured

    names = list(claims.__all__) if arguments.all else list(arguments.names)
    if arguments.family and not arguments.all:
        names += [name for name in claims.family(arguments.family) if name not in names]
    chosen = [claims.find(name)() for name in names]
    if not chosen:
        print("claims (turnout verify NAME, or --all):")
        for name in claims.__all__:
            print(f"  {name:<18} {(getattr(claims, name).__doc__ or '').splitlines()[0]}")
        return 0
    seeds = _seeds(arguments.seeds)
    table = Table(arguments.json, seeds=seeds, resume=arguments.resume) if arguments.json else None
    kept = table.claims if table else {}
    holding = sum(bool(kept[claim.name]["holds"]) for claim in chosen if claim.name in kept)
    note = None if arguments.quiet else (lambda text: print(f"  {text}", file=sys.stderr, flush=True))
    left = [claim for claim in chosen if claim.name not in kept]
    for result in measured(left, seeds=seeds, jobs=arguments.jobs, note=note):
        print(claims.show(result), flush=True)
        holding += result.holds
        if table:
            table.add(result, claims.__all__)
    print(f"{holding} of {len(chosen)} claims hold")
    return 0 if holding == len(chosen) else 1


def _seeds(given: str | None) -> tuple[int, ...]:
    from turnout.claims.claim import PUBLISHED_SEEDS
    from turnout.errors import UsageError, word

    if given is None:
        return PUBLISHED_SEEDS
    parts = given.split(",")
    seeds = tuple(int(part) for part in parts if part.isascii() and part.isdigit())
    if len(seeds) != len(parts) or len(set(seeds)) != len(seeds) or len(seeds) > 10:
        allowed, fix = "be 1 to 10 different whole numbers with commas", "pass --seeds 0,1,2"
        raise UsageError(word("--seeds", got=given, allowed=allowed, where="turnout verify", fix=fix))
    return seeds


def _check(arguments: argparse.Namespace) -> None:
    from turnout.errors import UsageError, word

    if arguments.device not in ("auto", "cpu"):
        allowed = "be auto or cpu: a claim's numbers are published for the CPU, and its seconds are so few"
        got, fix = arguments.device, "leave --device out, and pass --jobs N"
        raise UsageError(word("--device", got=got, allowed=allowed, where="turnout verify", fix=fix))
    if arguments.jobs < 1:
        fix = "pass --jobs 2"
        raise UsageError(word("--jobs", got=arguments.jobs, allowed="be at least 1", where="turnout verify", fix=fix))
    if arguments.resume and not arguments.json:
        allowed, fix = "go with --json FILE, which holds what was measured", "add --json FILE"
        raise UsageError(word("--resume", got="it alone", allowed=allowed, where="turnout verify", fix=fix))
