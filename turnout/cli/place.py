"""Place a model's experts on devices, from a recorded trace: by load, by where tokens go next, or both.

The trace is what turnout eval RUN --trace DIR records. The placement's file holds, beside the devices of all copies,
what it is worth on the trace and what no placement can exceed; turnout certify computes all of it again.

examples:
  turnout eval runs/x --trace trace              record which experts tokens take
  turnout place trace --devices 8 --out placement.json
  turnout place trace --devices 8 --by load --slots 72 --out placement.json
                                                 copies of the busiest experts: 72 slots a layer
  turnout place trace --devices 16 --nodes 2 --balance 1.1 --out placement.json
  turnout place later --devices 8 --from placement.json --moves 0.1 --out new.json
                                                 place again where at most a tenth of the copies travel
  turnout certify placement.json trace           is it worth what it says?
"""

import argparse
from typing import TYPE_CHECKING

from turnout.cli.early import check_there, check_writable

if TYPE_CHECKING:
    from turnout.types import Report

HELP = "which device holds which expert, from a recorded trace"
# turnout.recipes.place.WAYS, which would load torch; a test compares them.
WAYS = ("both", "load", "affinity", "contiguous", "eplb", "exflow", "moetuner")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout place`` takes."""
    parser.add_argument("trace", metavar="TRACE", help="a folder that turnout eval --trace wrote")
    parser.add_argument("--devices", type=int, required=True, metavar="G", help="how many devices")
    parser.add_argument("--nodes", type=int, default=1, metavar="N", help="how many machines they are in (default 1)")
    parser.add_argument("--slots", type=int, metavar="S", help="copies in each layer (default one of each expert)")
    parser.add_argument(
        "--by",
        choices=WAYS,
        default="both",
        help="what it goes by (default both: few steps between devices, none of them much busier than the others)",
    )
    parser.add_argument(
        "--balance",
        type=float,
        metavar="X",
        help="for both: how busy the busiest device of a layer may be, over the mean (default 1.05)",
    )
    parser.add_argument("--from", dest="before", metavar="FILE", help="the placement that is there now")
    parser.add_argument(
        "--moves", type=float, metavar="X", help="with --from: the share of copies that may travel (default 0.1)"
    )
    parser.add_argument("--expert-bytes", type=float, metavar="B", help="with --from: what travels with each copy")
    parser.add_argument("--speeds", metavar="X,X,...", help="how fast each device is, relative (default all alike)")
    parser.add_argument("--out", metavar="FILE", help="write the placement here, as JSON")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Places, prints and writes."""
    from turnout.errors import UsageError, word

    check_there("TRACE", [arguments.trace], "turnout place")
    check_there("--from", [arguments.before], "turnout place")
    check_writable("turnout place", out=arguments.out)
    for name in ("moves", "expert_bytes"):
        if getattr(arguments, name) is not None and arguments.before is None:
            what, fix = f"--{name.replace('_', '-')}", "add --from FILE, or leave it out"
            allowed = "stand beside --from FILE, whose copies it counts,"
            raise UsageError(word(what, got="no --from", allowed=allowed, where="turnout place", fix=fix))
    if arguments.balance is not None and arguments.by != "both":
        got, fix = f"--by {arguments.by}", "leave --balance out, or use --by both"
        raise UsageError(word("--balance", got=got, allowed="stand beside --by both", where="turnout place", fix=fix))
    bytes_ = arguments.expert_bytes or 0.0
    if not 0 <= bytes_ < float("inf"):
        allowed, fix = "be a number of at least 0", "pass the bytes of an expert's weights"
        raise UsageError(word("--expert-bytes", got=bytes_, allowed=allowed, where="turnout place", fix=fix))
    from turnout.recipes.place import place_trace
    from turnout.types import Placement

    placed = place_trace(
        arguments.trace,
        devices=arguments.devices,
        nodes=arguments.nodes,
        slots=arguments.slots,
        by=arguments.by,
        balance=1.05 if arguments.balance is None else arguments.balance,
        before=Placement.open(arguments.before) if arguments.before else None,
        moves=0.1 if arguments.moves is None else arguments.moves,
        expert_bytes=bytes_,
        speed_G=_speeds(arguments.speeds),
    )
    if arguments.out:
        placed.save(arguments.out)
    print(placed.report.to_json() if arguments.json else table(placed.report, placed.room))
    if arguments.out and not arguments.json:
        print(f"placement: {arguments.out}")
        before = f" --from {arguments.before}" if arguments.before else ""
        print(f"check it:  turnout certify {arguments.out} {arguments.trace}{before}")
    return 0


def _speeds(text: str | None) -> list[float]:
    from turnout.errors import UsageError, word

    try:
        return [float(part) for part in text.split(",")] if text is not None else []
    except ValueError as error:
        fix = "write --speeds 1,1,0.5,1"
        allowed = "be numbers with commas between"
        raise UsageError(word("--speeds", got=text, allowed=allowed, where="turnout place", fix=fix)) from error


def table(report: "Report", room: int | None = None) -> str:
    """The report as a few lines: here, contiguous, and what no placement is below; ``room`` is all slots there are."""
    experts, slots, nodes = report["experts"], report["slots"], report["nodes"]
    slots = slots if room in (None, slots) else f"{slots} of {room}"
    lines = [
        f"{experts} experts in {slots} slots on {report['devices']} devices in {nodes} node{'s' if nodes > 1 else ''}",
        f"{'':34}{'placed':>10}{'contiguous':>12}{'at least':>10}",
        f"{'busiest device over the mean':34}{report['imbalance']:>10.3f}{report['imbalance_contiguous']:>12.3f}"
        f"{report['imbalance_bound']:>10.3f}",
        f"{'steps that change the device':34}{report['crossing']:>10.1%}{report['crossing_contiguous']:>12.1%}"
        f"{report['crossing_bound']:>10.1%}",
    ]
    if nodes > 1:
        shares = report["crossing_nodes"], report["crossing_nodes_contiguous"]
        lines.append(f"{'steps that change the node':34}{shares[0]:>10.1%}{shares[1]:>12.1%}")
    chance, bound = report["crossing_chance"], report["crossing_bound"]
    possible = chance - bound
    if possible > 0:
        gained = (chance - report["crossing"]) / possible
        lines.append(
            f"the trace: {chance:.1%} of steps cross by chance, at least {bound:.1%} in any placement; "
            f"this one has {gained:.0%} of what lies between"
        )
    if report["moves"] is not None:
        lines.append(
            f"moves: {report['moves']} copies ({report['moved_share']:.1%}), {report['moved_bytes']:.4g} bytes"
        )
    return "\n".join(lines)
