"""Repeat a run, or a conversion, exactly from its run.json.

examples:
  turnout run runs/x/run.json --out runs/again
  turnout run runs/x/run.json seed=1 --out runs/seed1
  turnout run mixtral --out mixtral-again         what turnout convert did, from the folder that it wrote
"""

import argparse
import sys

from turnout.cli.device import add_device, device_field
from turnout.cli.early import check_there
from turnout.errors import UsageError, word

HELP = "repeat a run, or a conversion, from its run.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout run`` takes."""
    parser.add_argument("run_json", metavar="RUN.JSON", help="a run.json, or the output folder that holds one")
    parser.add_argument("overrides", nargs="*", metavar="field=value", help="fields to change")
    parser.add_argument("--out", required=True, metavar="DIR", help="a new output folder")
    parser.add_argument("--tokens", metavar="DIR", help="where the prepared tokens are kept; default OUT/tokens")
    add_device(parser, default=None, note="the one it ran on, where that is here (default); or auto")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Runs it again in a new folder."""
    check_there("RUN.JSON", [arguments.run_json], "turnout run")
    from turnout.recipes.adapters import Adapted, adapt_again, is_adaptation
    from turnout.recipes.again import as_it_ran
    from turnout.recipes.convert import is_conversion, repeat
    from turnout.recipes.execute import execute
    from turnout.recipes.progress import progress_for

    adapts = is_adaptation(arguments.run_json)
    if adapts or is_conversion(arguments.run_json):
        if arguments.overrides or arguments.tokens:
            raise UsageError(
                word(
                    "fields and --tokens",
                    got=" ".join([*arguments.overrides, arguments.tokens or ""]).strip(),
                    allowed="stay out where a conversion is done again",
                    where="turnout run",
                    fix="leave them out, or call turnout convert with other options",
                )
            )
        progress = progress_for(quiet=arguments.quiet)
        try:
            again = adapt_again if adapts else repeat
            done = again(
                arguments.run_json, arguments.out, device=arguments.device, say=progress.say, part=progress.part
            )
        finally:
            progress.stop()
        print(done if isinstance(done, Adapted) else done.summary())
        return 0

    fields = [*arguments.overrides, *device_field(arguments)]
    plan = as_it_ran(arguments.run_json, fields, lambda text: print(f"note: {text}", file=sys.stderr))
    done = execute(plan, arguments.out, tokens_folder=arguments.tokens, quiet=arguments.quiet)
    print(done.table())
    print(f"report: {done.report}")
    return 0
