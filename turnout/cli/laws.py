"""Fit the scaling law of routed models: what N parameters with E experts come to, from runs or from a table.

log L = a log N + b log e + c log N log e + d, where e is E, flattened at both ends. It says of how large a dense model
an expert model has the loss, and nothing outside the models that it is fitted to, unless asked for.

examples:
  turnout laws runs/*                            runs of turnout train with one expert a token, and dense ones
  turnout laws runs/* --law separable            three numbers, where there are few runs
  turnout laws runs/* --by cost                  by FLOPs and by parameters held for each used: any top_k
  turnout laws --table losses.csv                columns params, experts, loss; .csv.gz is read, too
  turnout laws runs/* --ask 2e6,8 --ask 5e6,16   models that are not there
  turnout laws runs/* --out folder               also a page, and the numbers as JSON
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from turnout.cli.early import check_folder, check_there
from turnout.errors import UsageError, word

if TYPE_CHECKING:
    from turnout.types import Report

HELP = "fit the scaling law of routed models, from runs or a table"
_WHERE = "turnout laws"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds what ``turnout laws`` takes."""
    parser.add_argument("runs", nargs="*", metavar="RUN", help="folders of turnout train, trained alike")
    parser.add_argument("--table", metavar="FILE", help="a CSV with params, experts and loss, in the place of runs")
    parser.add_argument(
        "--law",
        choices=("saturating", "bilinear", "separable"),
        default="saturating",
        help="six free numbers, four (e is E) or three (and no interaction)",
    )
    parser.add_argument(
        "--by",
        choices=("experts", "cost"),
        default="experts",
        help="N and E, or the FLOPs of a token and all parameters over those that it meets",
    )
    parser.add_argument(
        "--ask", action="append", default=[], metavar="N,E", help="also say the loss of such a model; repeatable"
    )
    parser.add_argument("--extrapolate", action="store_true", help="answer --ask outside the models, and say how far")
    parser.add_argument("--draws", type=int, default=200, metavar="N", help="for the intervals (default 200)")
    parser.add_argument("--seed", type=int, default=0, help="of starts and draws (default 0)")
    parser.add_argument("--out", metavar="FOLDER", help="write laws.html and laws.json here")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Fits, prints and writes."""
    if bool(arguments.runs) == bool(arguments.table):
        got, fix = "both" if arguments.runs else "neither", "name runs, or pass --table losses.csv"
        raise UsageError(word("RUN and --table", got=got, allowed="be one of the two", where=_WHERE, fix=fix))
    check_there("RUN", arguments.runs, _WHERE)
    check_there("--table", [arguments.table], _WHERE)
    check_folder(arguments.out, _WHERE)
    asked = [_pair(text) for text in arguments.ask]
    if arguments.draws < 0 or not 0 <= arguments.seed < 1 << 63:
        got, fix = f"{arguments.draws} and {arguments.seed}", "leave them out"
        raise UsageError(word("--draws and --seed", got=got, allowed="be 0 or more", where=_WHERE, fix=fix))
    from turnout.measure.scaling import points_of_runs, points_of_table
    from turnout.recipes.laws import law_of
    from turnout.show.laws import laws_html
    from turnout.storage import write_whole

    table = arguments.table
    points = points_of_table(table) if table else points_of_runs(arguments.runs, by=arguments.by)
    asking = {"ask": asked, "extrapolate": arguments.extrapolate}
    report = law_of(points, law=arguments.law, draws=arguments.draws, seed=arguments.seed, **asking)
    if arguments.out:
        folder = Path(arguments.out)
        folder.mkdir(parents=True, exist_ok=True)
        report.save(folder / "laws.json")
        write_whole(folder / "laws.html", laws_html(Path(table).name if table else f"{len(points)} runs", report))
    print(report.to_json() if arguments.json else text_of(report))
    if arguments.out and not arguments.json:
        print(f"page: {Path(arguments.out) / 'laws.html'}")
    return 0


def _pair(text: str) -> tuple[float, float]:
    try:
        size, experts = map(float, text.split(","))
    except ValueError:
        fix = "write --ask 2e6,8"
        allowed = "be parameters and experts with a comma between"
        raise UsageError(word("--ask", got=repr(text), allowed=allowed, where=_WHERE, fix=fix)) from None
    return size, experts


def text_of(report: "Report") -> str:
    """The report as text."""
    lines = [f"{report['law']} law of {len(report['points'])} models, error of log10 of the loss {report['rmse']:.4f}"]
    lines += [f"  {name} law: {value:.4f}" for name, value in report["rmse_of"].items()]
    lines.append("")
    for name, value in report["numbers"].items():
        low_high = report["interval"].get(name)
        spread = "" if not low_high else f"   95 %: {_number(low_high[0])} to {_number(low_high[1])}"
        lines.append(f"  {name:6}{_number(value):>10}{spread}")
    lines.append(f"  experts no longer help beyond {_number(report['cutoff'])} parameters")
    lines.append(f"\n  {'parameters':>12}{'experts':>9}{'loss':>9}{'law':>9}   as a dense model of")
    for one in [*report["points"], *report["asked"]]:
        seen = f"{one['loss']:.4f}" if "loss" in one else "-"
        far = f"   {one['outside']:.2f} decades outside the models" if one.get("outside") else ""
        row = f"  {one['params']:>12.4g}{one['experts']:>9g}{seen:>9}{one['said']:>9.4f}   {_number(one['effective'])}"
        lines.append(row + far)
    return "\n".join([*lines, *(f"note: {note}" for note in report.notes)])


def _number(value: float | None) -> str:
    return "no limit" if value is None else f"{value:.4g}"
