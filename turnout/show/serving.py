"""The page of a server under load: how long its users wait, and what it does for them, load by load."""

import dataclasses
from collections.abc import Mapping, Sequence
from html import escape

from turnout.show.charts import Series, line_chart
from turnout.show.page import card, flat, frame, section, table

__all__ = ["ServingPoint", "serving_html"]


@dataclasses.dataclass(frozen=True)
class ServingPoint:
    """One load, and what a page says of it.

    Args:
        load: its name.
        level: requests a second, or streams.
        is_open: whether requests come at a rate.
        values: every other number, by its name and unit: ``"TTFT median, ms"``.
        errors: kind of failure -> how many.

    >>> ServingPoint("4 streams", 4, False, {"tokens/s": 80.0}, {}).load
    '4 streams'

    Source: none; plain bookkeeping.
    """

    load: str
    level: float
    is_open: bool
    values: Mapping[str, float]
    errors: Mapping[str, int]


def serving_html(
    model: str, url: str, about: Mapping[str, str], points: Sequence[ServingPoint], notes: Sequence[str] = ()
) -> str:
    """A page of its own, which opens without a network.

    Args:
        model: the name that was asked for.
        url: of the server.
        about: what was asked.
        points: one for each load; those with the same ``is_open`` are joined by lines.
        notes: what the reader must know.

    Returns:
        The text of the page.

    >>> one = ServingPoint("rate 2/s", 2.0, True, {"TTFT median, ms": 31.0}, {"timeout": 1})
    >>> "timeout" in serving_html("moe", "http://127.0.0.1:8000", {}, [one])
    True

    Source: none; plain bookkeeping.
    """
    sections = list[str]()
    for is_open, over in ((True, "requests/s"), (False, "streams")):
        group = sorted((one for one in points if one.is_open is is_open), key=lambda one: one.level)
        if group:
            charts = [_chart(name, group, over) for name in _drawn(group)] if len(group) > 1 else []
            drawn = [f'<div class="two">{"".join(charts)}</div>'] if charts else []
            title = "Requests that do not wait for answers" if is_open else "Users who ask again when answered"
            what = "Open loop: they come at a rate, whatever the server does." if is_open else "Closed loop."
            sections.append(section(title, what, [*drawn, _table(group)], ""))
    told = "".join(f"<li>{escape(note)}</li>" for note in notes)
    head = (
        f'<header><div class="inner"><p class="eyebrow">a server under load</p><h1>{escape(model)}</h1>'
        f'<p class="also">{escape(url)}</p><ul class="lead">{told}</ul></div></header>'
    )
    asked = table(list(flat(dict(about)).items()))
    sections.append(f"<section><h2>What was asked</h2>{asked}</section>")
    return frame(f"{model} under load", head, sections, experts=0, payload={"charts": [], "passages": []})


def _drawn(group: Sequence[ServingPoint]) -> list[str]:
    """The quantities that have a chart: what is measured in ms by its median and p99, and rates."""
    names = dict.fromkeys(name.split(" median")[0] for name in group[0].values if " median" in name)
    return [*names, *(name for name in group[0].values if name.endswith("/s"))]


def _chart(name: str, group: Sequence[ServingPoint], over: str) -> str:
    parts = {part: f"{name} {part}, ms" for part in ("median", "p99")} if not name.endswith("/s") else {name: name}
    series = [
        Series(part, number, [(one.level, one.values[key]) for one in group])
        for number, (part, key) in enumerate(parts.items())
    ]
    unit = name if name.endswith("/s") else f"{name}, ms"
    return card(unit, f"over {over}", line_chart(unit, series, over=over).svg)


def _table(group: Sequence[ServingPoint]) -> str:
    names = [*group[0].values]
    kinds = dict.fromkeys(kind for one in group for kind in one.errors)
    head = "".join(f"<th>{escape(one.load)}</th>" for one in group)
    rows = [[name, *(f"{one.values[name]:,.4g}" for one in group)] for name in names]
    rows += [[f"failed: {kind}", *(str(one.errors.get(kind, 0)) for one in group)] for kind in kinds]
    return table(rows, head)
