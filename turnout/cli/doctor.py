"""Say what is installed, which backend each device would use and why.

examples:
  turnout doctor
  turnout doctor --calibrate        refit the cost model of backends on this machine (about a minute)
"""

import argparse

HELP = "what is installed, which backend each device would use and why"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout doctor`` takes."""
    parser.add_argument("--calibrate", action="store_true", help="measure the backends here and remember the result")


def run(arguments: argparse.Namespace) -> int:
    """Prints the findings."""
    from turnout.recipes.doctor import examine

    for line in examine(calibrate=arguments.calibrate):
        print(line)
    return 0
