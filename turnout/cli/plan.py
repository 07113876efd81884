"""Find how a model is trained fastest on a cluster: layouts that fit, their step, memory and wires, before it starts.

MODEL is a recipe, or a folder with a config.json (weights need not be there). The cluster is a TOML file:

  nodes = 4                    # machines
  devices_per_node = 8
  memory_bytes = 80e9          # of a device
  flops_per_s = 4e14           # of matrix products, in practice
  intra_bytes_per_s = 300e9    # of a device's wire inside a node
  inter_bytes_per_s = 25e9     # of its share of the wire between nodes
  price_per_device_hour = 2.0

examples:
  turnout plan tiny --here 4 --out cluster.toml    measure this machine as 4 processes that train this model
  turnout plan tiny --cluster cluster.toml --out plan.json
  torchrun --nproc-per-node 4 -m turnout train tiny --plan plan.json --out runs/x
  turnout plan tiny --cluster cluster.toml --overlap --out plan.json    with a block schedule
  turnout plan mixtral batch=512 seq=4096 --cluster cluster.toml --top 10 --foreign
"""

import argparse
import dataclasses
import json

from turnout.cli.early import check_there, check_writable
from turnout.errors import UsageError, word

HELP = "which layout trains a model fastest on a cluster, before it starts"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout plan`` takes."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a recipe, or a folder with a config.json")
    parser.add_argument(
        "overrides", nargs="*", metavar="field=value", help="any field of the run, as batch=512 seq=4096"
    )
    parser.add_argument("--cluster", metavar="FILE", help="the devices, as TOML; without it, one device like an H100")
    parser.add_argument("--devices", type=int, metavar="N", help="use so many of them (all)")
    parser.add_argument("--top", type=int, metavar="N", help="how many layouts to show (5)")
    parser.add_argument(
        "--foreign", action="store_true", help="look at tensor and context parallelism too, which turnout does not run"
    )
    parser.add_argument(
        "--overlap",
        action="store_true",
        help="make a block schedule too: experts' exchanges and sums of gradients under what is computed",
    )
    parser.add_argument(
        "--here", type=int, metavar="N", help="measure this machine instead, shared by N processes that train MODEL"
    )
    parser.add_argument("--out", metavar="FILE", help="write the best plan here; with --here, the cluster")
    parser.add_argument("--html", metavar="FILE", help="write a page with the pictures of the best plan's step")
    parser.add_argument("--json", action="store_true", help="print everything, or the cluster, as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Plans, or measures, and prints."""
    if arguments.model is None:
        fix = "name a recipe (turnout train lists them) or a model's folder"
        raise UsageError(word("MODEL", got="nothing", allowed="be named", where="turnout plan", fix=fix))
    check_writable("turnout plan", out=arguments.out, html=arguments.html)
    if arguments.here is not None:
        return _here(arguments)
    check_there("--cluster", [arguments.cluster], "turnout plan")
    top = 5 if arguments.top is None else arguments.top
    if top < 1:
        fix = "pass --top 5"
        raise UsageError(word("--top", got=top, allowed="be at least 1", where="turnout plan", fix=fix))
    from turnout.recipes.layouts import plan_model
    from turnout.types import Cluster

    cluster = Cluster.open(arguments.cluster) if arguments.cluster else Cluster()
    found = plan_model(
        arguments.model,
        cluster,
        overrides=arguments.overrides,
        devices=arguments.devices,
        foreign=arguments.foreign,
        overlap=arguments.overlap,
        top=top,
    )
    runs = [number for number, choice in enumerate(found.choices) if choice.runs]
    if found.overlap is not None:  # asked for, so that is what is written
        runs = [found.choices.index(found.overlap.choice)]
    number = _first(runs) if arguments.out else None  # what cannot be written is said before anything is
    print(found.to_json() if arguments.json else found.table())
    if arguments.html:
        from turnout.storage import write_whole

        write_whole(arguments.html, found.page())
        if not arguments.json:
            print(f"\npage: {arguments.html}")
    if number is not None:
        found.save(arguments.out, number)
        if not arguments.json:
            print(f"\nplan {number + 1} is in {arguments.out}; to train by it:")
            print(f"  {found.command(number, plan=arguments.out)}")
    elif runs and not arguments.json:
        print("\nto train by it, write it with --out plan.json, then:")
        print(f"  {found.command(runs[0])}")
    return 0


def _first(runs: list[int]) -> int:
    if not runs:
        fix = "leave --foreign out, or raise --top"
        allowed = "hold a layout that turnout train runs"
        raise UsageError(word("--out", got="none but foreseen ones", allowed=allowed, where="turnout plan", fix=fix))
    return runs[0]


def _here(arguments: argparse.Namespace) -> int:
    if arguments.cluster:
        fix = "measure first, then plan with --cluster FILE"
        got, allowed = "--cluster beside it", "be measured, not told"
        raise UsageError(word("--here", got=got, allowed=allowed, where="turnout plan", fix=fix))
    if not 1 <= arguments.here <= 64:
        allowed, fix = "be 1 to 64 processes", "pass --here 4"
        raise UsageError(word("--here", got=arguments.here, allowed=allowed, where="turnout plan", fix=fix))
    for name in ("devices", "top", "foreign", "overlap", "html"):
        if getattr(arguments, name) not in (None, False):
            allowed, fix = f"stand without --{name}: it measures, and plans nothing,", f"leave --{name} out here"
            got, fix = f"--{name} beside it", f"{fix}, and pass it where you plan with --cluster FILE"
            raise UsageError(word("--here", got=got, allowed=allowed, where="turnout plan", fix=fix))
    from turnout.recipes.cluster import as_toml, measured_cluster
    from turnout.recipes.layouts import run_of
    from turnout.storage import write_whole

    cluster = measured_cluster(arguments.here, run_of(arguments.model, arguments.overrides))
    text = as_toml(cluster)
    print(json.dumps(dataclasses.asdict(cluster), indent=2) + "\n" if arguments.json else text, end="")
    if arguments.out:
        write_whole(arguments.out, text)
    return 0
