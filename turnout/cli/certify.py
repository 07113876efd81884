"""Say whether model B computes what model A does: to the bit, within a bound, or not, and in which layer they part.

A and B are run folders, folders of turnout's own models or of transformers, or models of the hub (org/name). Without
--prompts both run on the same 512 random tokens. The exit code is 0 when they are equal, 1 when they are not, 2 for a
mistake in the input.

examples:
  turnout certify runs/x exported
  turnout certify dense sparse --prompts prompts.txt --bound 1e-5 --out certificate.json
  turnout certify before after --map plan.json             modules that have other names in B
  turnout certify --check certificate.json dense sparse --prompts prompts.txt
  turnout certify placement.json trace           is a placement of experts worth what it says, on its trace?
"""

import argparse
from pathlib import Path

from turnout.cli.device import add_device
from turnout.cli.early import check_there
from turnout.errors import UsageError, word

HELP = "whether one model computes what another does, and where they part"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout certify`` takes."""
    parser.add_argument(
        "a", metavar="A", help="the model that is right: a folder, or org/name of the hub; or a placement's file"
    )
    parser.add_argument("b", metavar="B", help="the model that should compute the same; or the placement's trace")
    parser.add_argument(
        "--prompts",
        metavar="FILE",
        help="a prompt a line, or .jsonl with texts or lists of ids; default random tokens, always the same",
    )
    parser.add_argument(
        "--map", metavar="FILE", help='JSON: the names of modules in A and in B, {"blocks.1": "blocks.2"}'
    )
    parser.add_argument(
        "--bound",
        type=float,
        metavar="X",
        help="the largest relative distance of logits that counts as equal (default by dtype: 1e-4 for float32, "
        "0.05 for bfloat16)",
    )
    parser.add_argument("--out", metavar="FILE", help="write the certificate here, as JSON")
    parser.add_argument("--check", metavar="FILE", help="check that this certificate of A and B still holds")
    parser.add_argument("--from", dest="before", metavar="FILE", help="of a placement: the one that it came from")
    parser.add_argument("--json", action="store_true", help="print the certificate as JSON")
    add_device(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compares or checks, and prints; the exit code is 1 when the two differ or the certificate does not hold."""
    if Path(arguments.a).is_file():
        return _placement(arguments)
    if arguments.before is not None:
        allowed, fix = "go with a placement's file", "leave --from out, or name the placement's file first"
        got = f"--from and {arguments.a}"
        raise UsageError(word("--from", got=got, allowed=allowed, where="turnout certify", fix=fix))
    for what in ("a", "b", "prompts", "map", "check"):
        name = what.upper() if len(what) == 1 else f"--{what}"
        check_there(name, [getattr(arguments, what)], "turnout certify", hub=len(what) == 1)
    from turnout.recipes.certify import certify_folders, read_map

    if arguments.check:
        return _check(arguments)
    names = read_map(arguments.map) if arguments.map else None
    found, worst = certify_folders(
        arguments.a,
        arguments.b,
        prompts=arguments.prompts,
        names=names,
        bound=arguments.bound,
        device=arguments.device,
    )
    if arguments.out:
        found.save(arguments.out)
    if arguments.json:
        print(found.to_json())
    else:
        print(found)
        if worst is not None:
            print(f"  worst prompt   {worst!r}")
        if arguments.out:
            print(f"certificate: {arguments.out}")
    return 0 if found.equal else 1


def _placement(arguments: argparse.Namespace) -> int:
    names = ("prompts", "map", "bound", "out", "check")
    given = [name for name in names if getattr(arguments, name) is not None]
    if given:
        got, allowed = f"a placement and --{given[0]}", "go with two models, not with a placement and its trace"
        fix = f"leave --{given[0]} out"
        raise UsageError(word(f"--{given[0]}", got=got, allowed=allowed, where="turnout certify", fix=fix))
    check_there("B", [arguments.b], "turnout certify")
    check_there("--from", [arguments.before], "turnout certify")
    from turnout.recipes.place import check_placement

    broken, report = check_placement(arguments.a, arguments.b, before=arguments.before)
    print(report.to_json() if arguments.json else report)
    if broken:
        print("\n".join(f"the placement does not hold: {line}" for line in broken))
        return 1
    print("the placement holds: all that it says was computed again")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from turnout.recipes.certify import check_certificate

    given = [name for name in ("map", "bound", "out") if getattr(arguments, name) is not None]
    if given:
        raise UsageError(
            word(
                f"--{given[0]}",
                got=f"--check and --{given[0]}",
                allowed="not go with --check, which takes it from the certificate",
                where="turnout certify",
                fix=f"leave --{given[0]} out",
            )
        )
    given = {"prompts": arguments.prompts, "device": arguments.device}
    broken, found = check_certificate(arguments.check, arguments.a, arguments.b, **given)
    if found is not None:
        print(found.to_json() if arguments.json else found)
    if broken:
        print("\n".join(f"the certificate does not hold: {line}" for line in broken))
        return 1
    print(f"the certificate holds: {arguments.check}")
    return 0 if found is not None and found.equal else 1
