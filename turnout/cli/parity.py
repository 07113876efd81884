"""Say whether training under a plan is training: every gradient on many processes against those of one.

Starts the plan's processes on this machine's CPU (or is one of them, under torchrun), trains a small model, or a copy
of MODEL, one step on one batch, and compares the loss and every parameter's gradient and weight with one process. The
ratio tells a wrong scale: 2.000000 is twice too large. PLAN is a file that turnout plan wrote, or degrees:

examples:
  turnout parity plan.json
  turnout parity dp_shard=4,ep=2                           FSDP2 with experts on two processes each
  turnout parity dp_shard=4,ep=2,zero=1 --model runs/x     of that model's shapes and weights
  turnout parity pp=2,dp_shard=2,schedule=ZB-H1            with a pipeline
  turnout parity dp_shard=2,ep=2 --dtype fp64              tells a wrong sum from another rounding
  turnout parity dp_shard=2,ep=2 --plant factor            with a fault, which must be found

exit codes: 0 equal, 1 not equal, 2 a mistake in the input
"""

import argparse

from turnout.cli.early import check_seed, check_there
from turnout.errors import UsageError, word

HELP = "whether a plan for many processes has the gradients of one"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout parity`` takes."""
    parser.add_argument("plan", metavar="PLAN", help="a plan's file, or degrees such as dp_shard=4,ep=2,zero=1")
    parser.add_argument("--model", metavar="MODEL", help="a run, a folder, or org/name of the hub; default a small one")
    parser.add_argument(
        "--dtype", default="fp32", metavar="D", help="fp32 (bound 1e-6, or fp64 decides) or fp64 (1e-12)"
    )
    parser.add_argument(
        "--plant", metavar="FAULT", help="plant a fault: factor, average, skip, drop or lose; twice or chunk"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of weights and batch (0)")
    parser.add_argument("--rows", type=int, default=12, metavar="N", help="how many of the worst to show (12)")
    parser.add_argument("--json", action="store_true", help="print all of it as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Compares and prints; the exit code is 1 when the two are not equal."""
    from pathlib import Path

    degrees = "=" in arguments.plan and not Path(arguments.plan).exists()
    if not degrees:
        check_there("PLAN", [arguments.plan], "turnout parity")
    check_seed(arguments.seed, "turnout parity")
    if arguments.rows < 0:
        fix = "pass --rows 12"
        raise UsageError(word("--rows", got=arguments.rows, allowed="be 0 or more", where="turnout parity", fix=fix))
    check_there("--model", [arguments.model], "turnout parity", hub=True)
    from turnout.recipes.parity import parity, plan_of
    from turnout.types.plan import Plan

    plan = plan_of(arguments.plan) if degrees else Plan.open(arguments.plan)
    how = {"dtype": arguments.dtype, "plant": arguments.plant, "seed": arguments.seed}
    found = parity(plan, model=arguments.model, **how)
    if found is not None:  # under torchrun the first process speaks for all
        print(found.to_json() if arguments.json else found.table(arguments.rows))
    return 0 if found is None or found.holds else 1
