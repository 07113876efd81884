"""Measure a model on held-out text: bits per byte, overall and per domain, and its load balance.

A folder of transformers, or one that turnout convert wrote, is measured on the text of --data with its own tokenizer.

examples:
  turnout eval runs/x                            on the run's own held-out documents
  turnout eval runs/x --data other_folder        on all of another text
  turnout eval runs/x --json
  turnout eval mixtral --data text               a model of transformers
  turnout eval mixtral --like runs/x             as runs/x is measured: what it was before it was trained on
"""

import argparse

from turnout.cli.device import add_device
from turnout.cli.early import check_data, check_there
from turnout.errors import UsageError, word

HELP = "bits per byte and load balance of a model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout eval`` takes."""
    parser.add_argument(
        "run_folder", metavar="RUN", help="an output folder of turnout train, a model's folder, or org/name"
    )
    parser.add_argument("--data", action="append", default=[], metavar="[NAME=]PATH", help="text to measure on")
    parser.add_argument(
        "--like", metavar="RUN", help="measure on the held-out documents of this run, as it is measured"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="about N tokens; of a folder that is no run, N of each domain"
    )
    parser.add_argument("--trace", metavar="DIR", help="also record a Trace of all routings here")
    parser.add_argument(
        "--token-ids", action="store_true", help="put token ids into the trace: they give the text away"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Measures and prints."""
    if arguments.token_ids and arguments.trace is None:
        allowed, fix = "stand beside --trace DIR, whose file they go into,", "add --trace DIR, or leave it out"
        raise UsageError(word("--token-ids", got="no --trace", allowed=allowed, where="turnout eval", fix=fix))
    check_there("RUN", [arguments.run_folder], "turnout eval", hub=True)
    check_there("--like", [arguments.like], "turnout eval")
    check_data(arguments.data, "turnout eval")
    from turnout.recipes.inspect import evaluate_run
    from turnout.recipes.run import named_domains

    report = evaluate_run(
        arguments.run_folder,
        domains=named_domains(arguments.data),
        limit=arguments.limit,
        trace=arguments.trace,
        token_ids=arguments.token_ids,
        like=arguments.like,
        device=arguments.device,
    )
    print(report.to_json() if arguments.json else report)
    return 0
