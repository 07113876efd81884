"""Say what is installed, which backend each device would use and why; of a model, how its tokens are made.

examples:
  turnout doctor
  turnout doctor runs/x             whether the model's tokens are made by the compiled step, and why not
  turnout doctor --calibrate        measure which kernels this machine is fastest with (half a minute)
"""

import argparse
import sys

from turnout.cli.early import check_there

HELP = "what is installed, which backend each device would use and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout doctor`` takes."""
    parser.add_argument("model", metavar="MODEL", nargs="?", help="a run's folder, a model's, or org/name of the hub")
    parser.add_argument("--calibrate", action="store_true", help="measure the backends here and remember the result")


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings."""
    check_there("MODEL", [arguments.model], "turnout doctor", hub=True)
    from turnout.recipes.doctor import decoding_of, examine

    terminal = sys.stderr.isatty()

    def say(text: str) -> None:
        print(f"\r\x1b[Kmeasuring {text} ..." if terminal else f"measuring {text}", end="" if terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    try:
        if arguments.model is not None and not arguments.calibrate:
            print(decoding_of(arguments.model))
            return 0
        for line in examine(calibrate=arguments.calibrate, say=say):
            print(line)
    finally:
        if terminal and arguments.calibrate:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return 0
