"""Train a model by a recipe, with fields overridden as field=value.

examples:
  turnout train                                    list the recipes
  turnout train tiny --show                        every field, its value and what it means
  turnout train tiny --out runs/x                  on the text that this Python carries
  turnout train tiny --data my_folder --out runs/x
  turnout train tiny width=192 top_k=2 steps=500 --data code=src --data prose=docs --out runs/y
  turnout train --resume --out runs/x              go on from the last checkpoint, bit for bit
"""

import argparse
import sys
import typing

from turnout.cli.device import add_device, device_field
from turnout.cli.early import check_data, check_there
from turnout.errors import UsageError, word

if typing.TYPE_CHECKING:
    from turnout.recipes.run import Run

HELP = "train a model by a recipe"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout train`` takes."""
    parser.add_argument("recipe", nargs="?", help="a recipe's name; without one, the recipes are listed")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="any field of the recipe, as width=192; --show lists them"
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="[NAME=]PATH",
        help="a file or folder of text, jsonl or parquet, or hf:DATASET; repeat it, named, for several domains",
    )
    parser.add_argument("--out", metavar="DIR", help="the output folder; it must be new, or hold this run to resume")
    parser.add_argument(
        "--resume",
        nargs="?",
        const="latest",
        metavar="CHECKPOINT",
        help="go on in --out from its last checkpoint, or from the one named (step-00000100)",
    )
    parser.add_argument("--tokens", metavar="DIR", help="where the prepared tokens are kept; default OUT/tokens")
    add_device(parser, default=None)
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events (an extra)")
    parser.add_argument("--show", action="store_true", help="print every field with its value, and train nothing")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Trains, and says where everything is."""
    check_data(arguments.data, "turnout train")
    if arguments.resume is not None and arguments.recipe is None:
        check_there("--out", [arguments.out], "turnout train --resume")
    from turnout import recipes
    from turnout.recipes.execute import execute
    from turnout.recipes.run import Run

    if arguments.recipe is not None and "=" in arguments.recipe:
        # `turnout train --resume steps=500`: the first override landed where a recipe's name goes.
        arguments.overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    if arguments.recipe is None and arguments.resume is None:
        print("recipes (turnout train NAME):")
        for name in recipes.__all__:
            print(f"  {name:<12} {(getattr(recipes, name).__doc__ or '').splitlines()[0]}")
        return 0
    arguments.overrides += device_field(arguments)
    if arguments.show and arguments.recipe is not None:
        from turnout.recipes.explain import explain

        for line in explain(_planned(arguments)):
            print(line)
        return 0
    if arguments.out is None:
        raise UsageError(
            word(
                "--out", got="nothing", allowed="name the output folder", where="turnout train", fix="add --out runs/x"
            )
        )
    if arguments.recipe is None:
        plan = Run.open(arguments.out).override(arguments.overrides)
        if arguments.data:
            raise UsageError(
                word(
                    "--data",
                    got=arguments.data,
                    allowed="stay as the run began",
                    where="turnout train --resume",
                    fix="leave --data out, or start a new run in another --out",
                )
            )
    else:
        plan = _planned(arguments)
    done = execute(
        plan,
        arguments.out,
        resume=arguments.resume,
        tokens_folder=arguments.tokens,
        tensorboard=arguments.tensorboard,
        quiet=arguments.quiet,
    )
    print(done.table())
    print(f"report: {done.report}")
    return 0


def _planned(arguments: argparse.Namespace) -> "Run":
    from turnout import recipes
    from turnout.recipes.run import named_domains

    recipe = recipes.find(arguments.recipe)
    # Other text first: it lifts the recipe's own limit, and a limit that is asked for stays.
    plan = recipe.with_domains(named_domains(arguments.data)) if arguments.data else recipe
    plan = plan.scaled(arguments.overrides)
    if plan.train.warmup != recipe.train.warmup and not any("warmup=" in text for text in arguments.overrides):
        print(
            f"note: warmup={plan.train.warmup} of {plan.train.steps} steps, the share of the recipe "
            f"({recipe.train.warmup} of {recipe.train.steps}); warmup=N sets another",
            file=sys.stderr,
        )
    return plan
