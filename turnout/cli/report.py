"""Write the report.html of one or more runs; it opens without a network. A run still going is fine.

examples:
  turnout report runs/x
  turnout report runs/x runs/y --out compare.html
  turnout report smaller                          a folder of turnout convert: before and after
"""

import argparse

from turnout.cli.early import check_there

HELP = "write the report.html of one or more runs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout report`` takes."""
    parser.add_argument("run_folders", nargs="+", metavar="RUN", help="folders of turnout train, or one of convert")
    parser.add_argument("--out", metavar="FILE", help="the page (default: report.html in the first folder)")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and says where."""
    check_there("RUN", arguments.run_folders, "turnout report")
    from turnout.recipes.inspect import write_report

    print(write_report(arguments.run_folders, arguments.out))
    return 0
