"""Say whether what a model answers one user depends on the others in its batch, and by which way.

MODEL is a run folder, a folder of turnout's own models or of transformers, or a model of the hub (org/name) that is
here; or package.module:attribute, which is imported, code and all: a torch.nn.Module, a layer or a model of anybody's,
or a function that makes one.

A victim's rows stay as they are while everything beside them changes: rows that fill its experts, rows equal to it, a
loud neighbour, padding, more and fewer rows, another place, another number of threads. The exit code is 0 when no
more than rounding differs (with --bits: when nothing does), 1 when more leaked, 2 for a mistake in the input. A probe
that could not run is named, and is no pass.

examples:
  turnout audit runs/x
  turnout audit runs/x --batch-invariant --bits       within batch_invariant not one bit may differ
  turnout audit mixtral --stock                       transformers' own model, from the same folder
  turnout audit my_package.layers:make_moe --width 512
"""

import argparse

from turnout.cli.device import add_device
from turnout.cli.early import check_seed, check_there

HELP = "whether others in a batch change what a model answers, and how"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout audit`` takes."""
    parser.add_argument("model", metavar="MODEL", help="a folder, org/name of the hub, or package.module:attribute")
    parser.add_argument("--stock", action="store_true", help="a folder of transformers as transformers' own model")
    parser.add_argument(
        "--batch-invariant", action="store_true", help="within turnout.types.batch_invariant (turnout's own models)"
    )
    parser.add_argument("--bits", action="store_true", help="exit with 1 where as much as a bit differs")
    parser.add_argument("--width", type=int, metavar="D", help="numbers a token, of a layer that does not say it")
    parser.add_argument("--length", type=int, metavar="S", help="tokens a row (default 12 of a model, 4 of a layer)")
    parser.add_argument(
        "--batches", type=int, default=40, metavar="N", help="a probe's batches, 4 or more (default 40)"
    )
    parser.add_argument(
        "--bound",
        type=float,
        metavar="X",
        help="the largest relative difference that rounding explains (default by dtype: 1e-4 for float32, 3e-2 for "
        "bfloat16)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the rows (default 0)")
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Audits and prints; the exit code is 1 when something leaked."""
    if ":" not in arguments.model:
        check_there("MODEL", [arguments.model], "turnout audit", hub=True)
    check_seed(arguments.seed, "turnout audit")
    from turnout.recipes.audit import audit_model

    found = audit_model(
        arguments.model,
        stock=arguments.stock,
        invariant=arguments.batch_invariant,
        width=arguments.width,
        length=arguments.length,
        batches=arguments.batches,
        bound=arguments.bound,
        seed=arguments.seed,
        device=arguments.device,
    )
    print(found.to_json() if arguments.json else found)
    return 1 if found.leaks(bits=arguments.bits) else 0
