"""The page of a scaling law: the models and the law through them, its numbers, and what experts are worth."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from turnout.measure.report import quantity
from turnout.show.charts import Drawing, Series, line_chart
from turnout.show.page import card, frame, table
from turnout.types.report import Report

__all__ = ["laws_html"]

_WHAT = {
    "a": "of log N: what ten times the parameters do to a dense model",
    "b": "of log e: what ten times the experts do",
    "c": "of both: above 0, experts help larger models less",
    "d": "what is left",
    "start": "what a dense model counts for, in experts",
    "most": "what infinitely many experts count for",
}


def laws_html(title: str, report: Report) -> str:
    """A page of its own, which opens without a network.

    Args:
        title: what the models are.
        report: what ``recipes.laws.law_of`` found.

    Returns:
        The text of the page.

    >>> one = {"name": "a", "params": 1e6, "experts": 8.0, "loss": 3.0, "said": 3.0, "effective": 2e6}
    >>> values = {"law": "separable", "points": [one], "rmse": 0.0, "numbers": {"a": -0.1}, "interval": {}, "asked": []}
    >>> "a dense model of" in laws_html("runs", Report("laws", values | {"cutoff": None, "rmse_of": {}}))
    True

    Source: none; plain bookkeeping.
    """
    points = report["points"]
    lead = f'<p class="lead">{len(points)} models; root mean square error of log10 of the loss {report["rmse"]:.4f}</p>'
    said = f'<p class="eyebrow">a {escape(report["law"])} scaling law</p><h1>{escape(title)}</h1>'
    head = f'<header><div class="inner">{said}{lead}</div></header>'
    drawing = _chart(points)
    about = "over log2 of the number of experts; faint: the law"
    drawn = card("Loss", about, f'<div data-chart="0">{drawing.svg}</div>')
    numbers = table(_numbers(report), _head("fitted", "95 %", "what it is"))
    worth = table(_worth(points), _head("parameters", "experts", "loss", "the law", "a dense model of"))
    parts = {"The models and the law": drawn, "Its numbers": numbers, "What experts are worth": worth}
    sections = [f"<section><h2>{title}</h2>{inside}</section>" for title, inside in parts.items()]
    if report["asked"]:
        names = ("experts", "the law", "a dense model of", "decades outside the models")
        sections.append(f"<section><h2>What was asked</h2>{table(_asked(report), _head(*names))}</section>")
    if report.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        sections.append(f'<section><h2>To know</h2><ul class="lead">{notes}</ul></section>')
    return frame(title, head, sections, experts=0, payload={"colors": 9, "charts": [drawing.data]})


def _chart(points: list[Mapping[str, Any]]) -> Drawing:
    """A line for each size, through what the models have; a faint one is what the law says of them."""
    series = []
    for number, group in enumerate(_sizes(points)):
        name = quantity(group[0]["params"])
        here = sorted(group, key=lambda one: one["experts"])
        across = [math.log2(one["experts"]) for one in here]
        seen, said = (list(zip(across, (one[key] for one in here), strict=True)) for key in ("loss", "said"))
        series.append(Series(name, number, seen, faint=said))
    return line_chart("loss", series, over="log2 of experts")


def _sizes(points: list[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Models of nearly one size together: a router adds some parameters for each expert."""
    groups: list[list[Mapping[str, Any]]] = []
    for one in sorted(points, key=lambda one: one["params"]):
        if groups and one["params"] < 1.1 * groups[-1][-1]["params"]:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


def _numbers(report: Report) -> list[list[str]]:
    rows = []
    for name, value in report["numbers"].items():
        low_high = report["interval"].get(name)
        spread = "-" if not low_high else " to ".join(map(_number, low_high))
        rows.append([name, _number(value), spread, _WHAT[name]])
    rows.append(["N*", _number(report["cutoff"]), "-", "parameters beyond which experts no longer help"])
    simpler = ", ".join(f"{name} {value:.4f}" for name, value in report["rmse_of"].items())
    return [*rows, ["error", f"{report['rmse']:.4f}", "-", f"of log10 of the loss; of simpler laws: {simpler or '-'}"]]


def _worth(points: list[Mapping[str, Any]]) -> list[list[str]]:
    return [[one["name"], *_model(one)[:2], f"{one['loss']:.4f}", *_model(one)[2:]] for one in points]


def _asked(report: Report) -> list[list[str]]:
    return [[*_model(one), f"{one['outside']:.2f}" if one["outside"] else "none"] for one in report["asked"]]


def _model(one: Mapping[str, Any]) -> list[str]:
    return [f"{one['params']:.4g}", f"{one['experts']:g}", f"{one['said']:.4f}", _number(one["effective"])]


def _number(value: float | None) -> str:
    return "no limit" if value is None else f"{value:.4g}"


def _head(*names: str) -> str:
    return "".join(f"<th>{name}</th>" for name in names)
