"""Train a dense and a sparse language model of equal active FLOPs on this machine's own text, and compare them.

Takes a few minutes on two CPU cores, and says how many when it begins. The text is what every Python carries: the
standard library's source, its reference manual and the interpreter's C headers.

examples:
  turnout demo
  turnout demo --quick                   the same path in a minute: too short to show what sparse is for
  turnout demo --steps 50 --out runs/quick
"""

import argparse

from turnout.cli.device import add_device

HELP = "dense against sparse on this machine's own text, with a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout demo`` takes."""
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="the output folder (default runs/demo)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="train for N steps instead of the recipe's")
    length.add_argument("--quick", action="store_true", help="train for a minute: everything works, little is learnt")
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Trains both, prints the table, what it means and the report's path."""
    from turnout.recipes.compare import QUICK_STEPS, demo

    steps = QUICK_STEPS if arguments.quick else arguments.steps
    done = demo(arguments.out, steps=steps, quiet=arguments.quiet, device=arguments.device)
    print(done.table())
    print(done.said())
    print(f"report: {done.report}")
    return 0
