"""Reproduce published results small, each against its own ablation over at least three seeds.

examples:
  turnout verify                    list the claims
  turnout verify loss_free          run one: at most two minutes on two cores
  turnout verify --all              run all and print the table
"""

import argparse
import json
import sys

HELP = "see published results reproduced against their ablations"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout verify`` takes."""
    parser.add_argument("names", nargs="*", metavar="CLAIM", help="the claims to run; without one, they are listed")
    parser.add_argument("--all", action="store_true", help="run every claim")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Runs the claims; the exit code is 1 when one does not hold."""
    from turnout import claims

    names = list(claims.__all__) if arguments.all else arguments.names
    if not names:
        print("claims (turnout verify NAME, or --all):")
        for name in claims.__all__:
            print(f"  {name:<18} {(getattr(claims, name).__doc__ or '').splitlines()[0]}")
        return 0
    chosen = [claims.find(name) for name in names]
    done = []
    for claim in chosen:
        note = None if arguments.quiet else (lambda text: print(f"  {text}", file=sys.stderr, flush=True))
        done.append(claim(note=note))
        print(claims.show(done[-1]), flush=True)
    if arguments.json:
        from turnout.storage import write_whole

        write_whole(arguments.json, json.dumps([claim.to_json_dict() for claim in done], indent=2) + "\n")
    print(f"{sum(claim.holds for claim in done)} of {len(done)} claims hold")
    return 0 if all(claim.holds for claim in done) else 1
