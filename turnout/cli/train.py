"""Train a model by a recipe, or one that exists on, with fields overridden as field=value.

examples:
  turnout train                                    list the recipes
  turnout train tiny --show                        every field, its value and what it means
  turnout train tiny --out runs/x                  on the text that this Python carries
  turnout train tiny --data my_folder --out runs/x
  turnout train tiny width=192 top_k=2 steps=500 --data code=src --data prose=docs --out runs/y
  turnout train --resume --out runs/x              go on from the last checkpoint, bit for bit
  turnout train --from MODEL --data my_folder --out runs/z
                                                   train a model on, with its own tokenizer: a run, a conversion, a
                                                   folder of transformers
  turnout train --from MODEL only=adapters rank=16 --data my_folder --out runs/z
  turnout train pyramid --out runs/p
  turnout train pyramid_student --teacher runs/p --out runs/s
                                                   a smaller model, taught by that one for the first of its steps
  torchrun --nproc-per-node 4 --max-restarts 3 -m turnout train tiny --layout dp_shard=4,ep=2 --out runs/p
                                                   on four processes, with the losses of one; after a crash they go on
                                                   from the last checkpoint by themselves
  torchrun --nproc-per-node 4 -m turnout train tiny --layout pp=2,dp_shard=2,microbatches=4 --out runs/q
                                                   the same through a pipeline of two; schedule=NAME takes another
"""

import argparse
import os
import shlex
import sys
import typing

from turnout.cli.device import add_device, device_field
from turnout.cli.early import check_data, check_there
from turnout.errors import UsageError, word

if typing.TYPE_CHECKING:
    from turnout.recipes.execute import Done
    from turnout.recipes.run import Run

HELP = "train a model by a recipe, or one that exists on"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout train`` takes."""
    parser.add_argument("recipe", nargs="?", help="a recipe's name; without one, the recipes are listed")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="any field of the recipe, as width=192; --show lists them"
    )
    parser.add_argument(
        "--from",
        dest="start",
        metavar="MODEL",
        help="start from this model's weights and tokenizer, in place of a recipe",
    )
    parser.add_argument(
        "--teacher", metavar="MODEL", help="learn from this model's probabilities too at first (kd_weight, kd_share)"
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
    parser.add_argument(
        "--layout",
        metavar="DEGREES",
        help="under torchrun: how the model is spread over the processes, as dp_shard=4,ep=2,zero=3 or "
        "pp=2,dp_shard=2,microbatches=4,schedule=ZBVZeroBubble",
    )
    parser.add_argument("--plan", metavar="FILE", help="under torchrun: the same from a plan that turnout plan wrote")
    parser.add_argument("--timeout", type=float, metavar="S", help="seconds that processes wait for each other (300)")
    parser.add_argument("--tensorboard", action="store_true", help="also write TensorBoard events (an extra)")
    parser.add_argument("--show", action="store_true", help="print every field with its value, and train nothing")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Trains, and says where everything is."""
    check_data(arguments.data, "turnout train")
    _sort_out(arguments)
    _check_start(arguments)
    _check_spread(arguments)
    if arguments.resume is not None and arguments.recipe is None:
        check_there("--out", [arguments.out], "turnout train --resume")
    from turnout import recipes
    from turnout.recipes.execute import execute
    from turnout.recipes.run import Run

    begins = arguments.recipe is not None or arguments.start is not None
    if not begins and arguments.resume is None:
        print("recipes (turnout train NAME):")
        for name in recipes.__all__:
            print(f"  {name:<12} {(getattr(recipes, name).__doc__ or '').splitlines()[0]}")
        print("or train a model on (turnout train --from MODEL)")
        return 0
    arguments.overrides += device_field(arguments)
    if arguments.show and begins:
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
    if not begins:
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
    how = {"resume": arguments.resume, "tokens_folder": arguments.tokens, "tensorboard": arguments.tensorboard}
    if arguments.layout is None and arguments.plan is None:
        done = execute(plan, arguments.out, **how, quiet=arguments.quiet)
    else:
        done = _spread(plan, arguments, how)
    if done is not None:  # one process speaks for all
        print(done.table())
        print(f"report: {done.report}")
    return 0


def _sort_out(arguments: argparse.Namespace) -> None:
    """Puts the first override where it belongs: it lands in the place of a recipe's name, or of a checkpoint's."""
    if arguments.recipe is not None and "=" in arguments.recipe:
        arguments.overrides.insert(0, arguments.recipe)
        arguments.recipe = None
    if arguments.resume is not None and "=" in arguments.resume:
        arguments.overrides.insert(0, arguments.resume)
        arguments.resume = "latest"


def _spread(run: "Run", arguments: argparse.Namespace, how: dict[str, typing.Any]) -> "Done | None":
    """Trains on the processes that torchrun has started, of which this is one."""
    from turnout.recipes.execute import execute
    from turnout.recipes.parity import plan_of
    from turnout.recipes.spread import spread
    from turnout.run.ranks.processes import launched
    from turnout.types.plan import Plan

    plan = plan_of(arguments.layout, "--layout") if arguments.layout is not None else Plan.open(arguments.plan)
    world = plan.layout.world
    if not launched() and world == 1:
        return execute(run, arguments.out, **how, quiet=arguments.quiet)
    if not launched():
        line = shlex.join(["torchrun", "--nproc-per-node", str(world), "-m", "turnout", *sys.argv[1:]])
        got, allowed = f"{plan.layout}, for {world} processes, and one", "be run by as many as it takes"
        raise UsageError(
            word("the layout", got=got, allowed=allowed, where="turnout train", fix=f"start it with: {line}")
        )
    wait = {} if arguments.timeout is None else {"timeout_s": arguments.timeout}
    return spread(run, arguments.out, plan=plan, **wait, **how, quiet=arguments.quiet)


def _check_spread(arguments: argparse.Namespace) -> None:
    """Refuses what does not go together of --layout, --plan and torchrun, before torch loads."""
    where, count = "turnout train", os.environ.get("WORLD_SIZE", "1")
    if arguments.layout is not None and arguments.plan is not None:
        got, fix = "both", "leave one of them out"
        raise UsageError(word("--layout and --plan", got=got, allowed="be one", where=where, fix=fix))
    if arguments.layout is not None and not arguments.layout.strip():
        allowed, fix = "name degrees", "write --layout dp_shard=4,ep=2, or leave it out"
        raise UsageError(word("--layout", got="nothing", allowed=allowed, where=where, fix=fix))
    if arguments.timeout is not None:
        alone = arguments.layout is None and arguments.plan is None
        if alone or not arguments.timeout > 0:
            got = f"{arguments.timeout:g} without processes that wait" if alone else arguments.timeout
            allowed = "go with --layout or --plan" if alone else "be above 0 s"
            fix = "leave it out" if alone else "pass --timeout 300"
            raise UsageError(word("--timeout", got=got, allowed=allowed, where=where, fix=fix))
    check_there("--plan", [arguments.plan], where)
    if arguments.layout is None and arguments.plan is None and count.isdigit() and int(count) > 1:
        got, allowed = f"nothing, in one of {count} processes", "say how the model is spread over them"
        raise UsageError(word("--layout", got=got, allowed=allowed, where=where, fix=f"add --layout dp_shard={count}"))


def _check_start(arguments: argparse.Namespace) -> None:
    """Refuses what does not go with --from, before torch loads."""
    if arguments.teacher is not None and arguments.recipe is None:
        got, fix = "no recipe beside it", "name a recipe: turnout train pyramid_student --teacher MODEL"
        raise UsageError(word("--teacher", got=got, allowed="begin a run", where="turnout train", fix=fix))
    check_there("--teacher", [arguments.teacher], "turnout train", hub=True)
    if arguments.start is None:
        return
    for flag, given in (("--resume", arguments.resume), (f"the recipe {arguments.recipe}", arguments.recipe)):
        if given is not None:
            fix = "leave --from out: a resumed run knows what it began with" if flag == "--resume" else "leave it out"
            got, allowed = f"{flag} beside it", "begin a run by itself"
            raise UsageError(word("--from", got=got, allowed=allowed, where="turnout train", fix=fix))
    check_there("--from", [arguments.start], "turnout train", hub=True)


def _recipe(arguments: argparse.Namespace) -> "Run":
    from turnout import recipes

    if arguments.start is None:
        return recipes.find(arguments.recipe)
    from turnout.recipes.tune import tune

    # What is trained decides about the rate, so it is known first; a value that is none is refused with the others.
    asked = [text.partition("=")[2] for text in arguments.overrides if text.startswith(("only=", "train.only="))]
    only = asked[-1] if asked and asked[-1] in ("router", "adapters") else "all"
    return tune(arguments.start, only=only)


def _planned(arguments: argparse.Namespace) -> "Run":
    from turnout.recipes.run import named_domains

    recipe = _recipe(arguments)
    if arguments.teacher is not None:
        from turnout.recipes.teach import taught

        recipe = taught(recipe, arguments.teacher)
    # Other text first: it lifts the recipe's own limit, and a limit that is asked for stays.
    plan = recipe.with_domains(named_domains(arguments.data)) if arguments.data else recipe
    plan = plan.scaled(arguments.overrides)
    asked = any("warmup=" in text for text in arguments.overrides)
    if plan.train.warmup != recipe.train.warmup and not asked and os.environ.get("RANK", "0") == "0":
        print(
            f"note: warmup={plan.train.warmup} of {plan.train.steps} steps, the share of the recipe "
            f"({recipe.train.warmup} of {recipe.train.steps}); warmup=N sets another",
            file=sys.stderr,
        )
    return plan
