"""Say what is installed, which backend each device would use and why.

examples:
  turnout doctor
  turnout doctor --calibrate        measure which kernels this machine is fastest with (half a minute)
"""

import argparse
import sys

HELP = "what is installed, which backend each device would use and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout doctor`` takes."""
    parser.add_argument("--calibrate", action="store_true", help="measure the backends here and remember the result")


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings."""
    from turnout.recipes.doctor import examine

    terminal = sys.stderr.isatty()

    def say(text: str) -> None:
        print(f"\r\x1b[Kmeasuring {text} ..." if terminal else f"measuring {text}", end="" if terminal else "\n",
              file=sys.stderr, flush=True)  # fmt: skip

    try:
        for line in examine(calibrate=arguments.calibrate, say=say):
            print(line)
    finally:
        if terminal and arguments.calibrate:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
    return 0
