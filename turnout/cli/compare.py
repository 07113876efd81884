"""Compare routers: trained on the same seeds at equal active FLOPs; a table, a page, and which differences are real.

Every run is a process of its own with one thread. What is finished is kept: after an interruption the same command goes
on. Without names the default set is compared, about twenty routers and a dense model.

examples:
  turnout compare                                the default set: an hour on two cores
  turnout compare TopK LossFree ReMoE --out runs/three
  turnout compare TopK 'wide:top_k=4;moe.hidden=64' --seeds 0,1,2,3
                                                 an arm of your own: a name, and fields of the recipe
  turnout compare TopK Switch --steps 400 --data docs --set width=128
  turnout compare TopK my_router:router=Mine --against TopK --jobs 2
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from turnout.cli.device import add_device
from turnout.cli.early import check_data, check_folder
from turnout.errors import UsageError, nearest, word

if TYPE_CHECKING:
    from turnout.recipes.run import Run
    from turnout.types import Report

HELP = "routers against each other, on the same seeds, with a page"
_WHERE = "turnout compare"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout compare`` takes."""
    parser.add_argument(
        "arms",
        nargs="*",
        metavar="ARM",
        help="a router, dense, or NAME:field=value;field=value (default: about twenty)",
    )
    parser.add_argument("--recipe", default="tiny", help="what is trained (default tiny)")
    parser.add_argument("--steps", type=int, metavar="N", help="optimizer steps of each run (default 150)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="another field of the recipe, of all arms"
    )
    parser.add_argument("--data", action="append", default=[], metavar="[NAME=]PATH", help="text, as of turnout train")
    parser.add_argument(
        "--seeds", default="0,1,2", metavar="N,N,...", help="a run of each arm for each (default 0,1,2)"
    )
    parser.add_argument(
        "--against", metavar="ARM", help="what the others are compared with (default: TopK, or the first)"
    )
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at once, one thread each (default 2)")
    add_device(parser)
    parser.add_argument("--out", default="runs/compare", metavar="FOLDER", help="runs and page (default runs/compare)")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(arguments: argparse.Namespace) -> int:
    """Trains what is not there yet, prints the table and writes the page."""
    check_data(arguments.data, _WHERE)
    check_folder(arguments.out, _WHERE)
    seeds = [_whole(part) for part in arguments.seeds.split(",")]
    if arguments.jobs < 1:
        raise UsageError(word("--jobs", got=arguments.jobs, allowed="be at least 1", where=_WHERE, fix="pass --jobs 2"))
    from turnout.recipes.study import DEFAULT_ARMS, arm_of, study
    from turnout.show.study import study_html
    from turnout.storage import write_whole

    base = _base(arguments)
    arms = [arm_of(name, base) for name in arguments.arms or DEFAULT_ARMS]
    names = [arm.name for arm in arms]
    against = arguments.against or ("TopK" if "TopK" in names else None)
    out, note = Path(arguments.out), None if arguments.quiet else _note
    report = study(base, arms, out, seeds=seeds, against=against, jobs=arguments.jobs, note=note)
    report.save(out / "compare.json")
    write_whole(out / "compare.html", study_html(report))
    print(report.to_json() if arguments.json else text_of(report))
    if not arguments.json:
        print(f"page: {out / 'compare.html'}")
    return 0


def _base(arguments: argparse.Namespace) -> "Run":
    """The recipe, shorter unless its length is said: a comparison has many runs."""
    from turnout import recipes
    from turnout.recipes.run import named_domains

    if arguments.recipe not in recipes.__all__:
        raise nearest(arguments.recipe, recipes.__all__, kind="recipe", where=_WHERE)
    base: Run = getattr(recipes, arguments.recipe)()
    if arguments.data:
        base = base.with_domains(named_domains(arguments.data))
    steps = 150 if arguments.steps is None else arguments.steps
    short = [f"steps={steps}", f"warmup={max(1, steps // 10)}", f"eval_every={max(1, steps)}", "eval_tokens=8192"]
    if not arguments.data:
        short += ["seq=128", "batch=16", "limit_mb=2"]
    return base.override([*short, f"train.device={arguments.device}", *arguments.set])


def _note(text: str) -> None:
    import sys

    print(text, file=sys.stderr, flush=True)


def _whole(text: str) -> int:
    if not text.strip().isdecimal():
        allowed, fix = "be whole numbers with commas between", "pass --seeds 0,1,2"
        raise UsageError(word("--seeds", got=repr(text), allowed=allowed, where=_WHERE, fix=fix))
    return int(text)


def text_of(report: "Report") -> str:
    """The report as text: an arm a line, sorted by its bits."""
    from turnout.show.study import quantity_texts

    found = {one["arm"]: one for one in report["differences"]}
    wide = max(len(row["arm"]) for row in report["rows"]) + 2
    heads = ("bits per byte", "less", "95 %", "experts", "MaxVio", "tokens/s", "tells domain", "kept")
    widths = (16, 9, 19, 9, 8, 10, 13, 7)
    lines = [f"{'':{wide}}" + "".join(f"{head:>{n}}" for head, n in zip(heads, widths, strict=True))]
    for row in sorted(report["rows"], key=lambda row: row["mean"]["bits_per_byte"]):
        said, one = quantity_texts(row), found.get(row["arm"])
        less = ["", ""]
        if one:
            mark = "*" if one["is_real"] else " "
            less = [f"{one['mean']:+.3f}{mark}", f"{one['low']:+.3f} to {one['high']:+.3f}"]
        cells = [said["bits_per_byte"], *less]
        cells += [said[name] for name in ("experts_per_token", "max_vio", "tokens_per_s", "specialisation", "kept")]
        lines.append(f"{row['arm']:{wide}}" + "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=True)))
    lines.append(f"less: of {report['against']}, seed by seed; * where it is real among all of them")
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])
