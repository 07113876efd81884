"""The page of a cache of experts: hits, moves and time of every policy over the slots, and which one to take."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from turnout.show.bars import value_bars
from turnout.show.charts import Series, line_chart
from turnout.show.page import card, frame, table
from turnout.types.report import Report

__all__ = ["cache_html"]

_ABOUT = {
    "hit_rate": ("Hits", "experts asked for that are there or under way, in percent"),
    "moved_rate": ("Not moved", "100 less the experts fetched, early ones too, per 100 asked for"),
}


def cache_html(name: str, report: Report) -> str:
    """A page of its own, which opens without a network.

    Args:
        name: of the trace.
        report: what ``recipes.cache.cache_trace`` found.

    Returns:
        The text of the page.

    >>> row = {"policy": "lru", "pool": "each layer", "slots": 2, "hit_rate": 0.5, "moved_rate": 0.5, "seconds": 1.0}
    >>> row |= {"waited_s": 0.5, "prefetch_accuracy": None}
    >>> told = {"pool": "each layer", "slots": 2, "policy": "lru", "reason": "1.2 of the bound's time"}
    >>> values = {"rows": [row], "recommended": [told], "steps": 9, "experts": 4, "layers": 1, "compute_s": 1e-3}
    >>> "Take lru" in cache_html("trace", Report("cache", values | {"fetch_s": 1e-3}))
    True

    Source: none; plain bookkeeping.
    """
    rows, told = report["rows"], report["recommended"]
    names = list(dict.fromkeys(row["policy"] for row in rows))
    shape = f"{report['steps']} passes through {report['layers']} layers of {report['experts']} experts"
    lead = f'<p class="lead">{escape(shape)}; on documents that no policy learnt from</p>'
    title = f'<p class="eyebrow">a cache of experts</p><h1>{escape(name)}</h1>'
    head = f'<header><div class="inner">{title}{lead}</div></header>'
    sections, charts = [_advice(told)], []
    for pool in dict.fromkeys(row["pool"] for row in rows):
        here = [row for row in rows if row["pool"] == pool]
        cards = []
        for key, (title, about) in _ABOUT.items():
            drawing = _lines(f"{title} ({pool})", key, names, here)
            if drawing is not None:
                index = len(charts)
                charts.append(drawing.data)
                cards.append(card(title, about, f'<div data-chart="{index}">{drawing.svg}</div>'))
        cards += [_times(one, here, names, report) for one in dict.fromkeys(row["slots"] for row in here)]
        sections.append(f"<section><h2>Slots of {escape(pool)}</h2>{''.join(cards)}{_table(here)}</section>")
    if report.notes:
        notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
        sections.append(f'<section><h2>To know</h2><ul class="lead">{notes}</ul></section>')
    return frame(f"cache of {name}", head, sections, experts=0, payload={"colors": len(names), "charts": charts})


def _advice(told: Sequence[Mapping[str, Any]]) -> str:
    lines = [[f"{one['slots']} in {one['pool']}", f"Take {one['policy']}", one["reason"]] for one in told]
    return f'<section><h2>What to take</h2><div class="card">{table(lines)}</div></section>'


def _lines(title: str, key: str, names: Sequence[str], rows: Sequence[Mapping[str, Any]]):
    found = []
    for color, name in enumerate(names):
        points = sorted((row["slots"], 100 * row[key]) for row in rows if row["policy"] == name)
        found.append(Series(name, color, points))
    return line_chart(title, found, digits=1, over="slots") if any(len(one.points) > 1 for one in found) else None


def _times(slots: int, rows: Sequence[Mapping[str, Any]], names: Sequence[str], report: Report) -> str:
    bars = [
        (row["policy"], row["seconds"], f"{1e3 * row['seconds'] / report['steps']:.3g} ms", names.index(row["policy"]))
        for row in rows
        if row["slots"] == slots
    ]
    about = f"one expert comes in {1e3 * report['fetch_s']:.3g} ms, a layer takes {1e3 * report['compute_s']:.3g} ms"
    return card(f"Time of a pass, {slots} slots", about, value_bars(bars))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for row in rows:
        right = row["prefetch_accuracy"]
        cells = [f"{100 * row['hit_rate']:.1f} %", f"{100 * row['moved_rate']:.1f} %"]
        cells += [
            "–" if right is None else f"{100 * right:.1f} %",
            f"{row['seconds']:.3g} s",
            f"{row['waited_s']:.3g} s",
        ]
        lines.append([f"{row['policy']}, {row['slots']} slots", *cells])
    names = ("hits", "not moved", "fetched early and used", "time", "of it waiting")
    return f'<div class="card">{table(lines, "".join(f"<th>{name}</th>" for name in names))}</div>'
