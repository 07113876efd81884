"""Train a dense and a sparse language model of equal active FLOPs on this machine's own text, and compare them.

Takes at most six minutes on two CPU cores. The text is what every Python carries: the standard library's source,
its reference manual and the interpreter's C headers.

examples:
  turnout demo
  turnout demo --steps 50 --out runs/quick
"""

import argparse

from turnout.cli.device import add_device

HELP = "dense against sparse on this machine's own text, with a report"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout demo`` takes."""
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="the output folder (default runs/demo)")
    parser.add_argument("--steps", type=int, metavar="N", help="train for N steps instead of the recipe's")
    add_device(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Trains both, prints the table and the report's path."""
    from turnout.recipes.compare import demo

    done = demo(arguments.out, steps=arguments.steps, quiet=arguments.quiet, device=arguments.device)
    print(done.table())
    print(f"report: {done.report}")
    return 0
