"""Harms folders of every kind and counts what comes of it; exit code 1 when anything did that must not.

python -m tests.fuzz --tries 400                 each kind 400 times
python -m tests.fuzz --seconds 600 --kind own    as often as fits
python -m tests.fuzz --kind own --only 17        try 17 again, and all that it said
"""

import argparse
import collections
import sys
import time
from pathlib import Path

from tests.fuzz.outcome import BAD, Outcome, as_json, tries
from tests.fuzz.subjects import SUBJECTS

COLUMNS = ("clear", "same", "other", *BAD)


def wrong(outcome: Outcome) -> bool:
    """Whether that must not happen: a silent change counts where hashes would have told."""
    return outcome.what in BAD or (outcome.what == "other" and SUBJECTS[outcome.kind].hashed)


def table(outcomes: list[Outcome]) -> str:
    """The counts by kind and way of harm."""
    counts = collections.Counter((one.kind, one.way, one.what) for one in outcomes)
    lines = [f"{'kind':<12}{'harm':<8}" + "".join(f"{name:>11}" for name in COLUMNS)]
    for kind, way in sorted({(one.kind, one.way) for one in outcomes}):
        lines.append(f"{kind:<12}{way:<8}" + "".join(f"{counts[kind, way, name] or '-':>11}" for name in COLUMNS))
    total = collections.Counter(one.what for one in outcomes)
    lines.append(f"{'all':<20}" + "".join(f"{total[name] or '-':>11}" for name in COLUMNS))
    return "\n".join(lines)


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--tries", type=int, default=100, help="of each kind (default: 100)")
    parser.add_argument("--seconds", type=float, help="go on with rounds of --tries until this much time is over")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=SUBJECTS, action="append", help="default: all")
    parser.add_argument("--only", type=int, help="the number of one try")
    parser.add_argument("--log", help="a file for all outcomes, a JSON line each")
    options = parser.parse_args()
    kinds, begin, outcomes, first = options.kind or list(SUBJECTS), time.monotonic(), [], 0
    while True:
        numbers = range(first, first + options.tries) if options.only is None else range(options.only, options.only + 1)
        for kind in kinds:
            outcomes += tries(kind, options.seed, numbers)
        first += options.tries
        if options.only is not None or options.seconds is None or time.monotonic() - begin > options.seconds:
            break
    if options.log:
        Path(options.log).write_text("".join(as_json(one) + "\n" for one in outcomes), encoding="utf-8")
    for one in outcomes:
        if wrong(one) or options.only is not None:
            print(f"{one.kind} --only {one.number}: {one.what} after harm to {one.way} of {one.file}\n{one.said}\n")
    print(f"seed {options.seed}\n{table(outcomes)}")
    return int(any(wrong(one) for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
