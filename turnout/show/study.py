"""The page of a comparison of routers: who needs fewer bits, which differences are real, and what each costs."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from turnout.measure.report import quantity
from turnout.show.page import card, flat, frame, table
from turnout.types.report import Report

__all__ = ["quantity_texts", "study_html"]

_WIDE, _LABEL, _ROW = 760, 150, 24
_LEARNT = {
    "bits_per_byte": "bits per byte",
    "experts_per_token": "experts a token",
    "max_vio": "MaxVio",
    "dropped": "dropped",
    "specialisation": "expert tells domain",
    "affinity": "layer tells next",
    "kept": "routing kept",
}
_COST = {
    "tokens_per_s": "tokens/s",
    "peak_memory_bytes": "memory, bytes",
    "flops": "FLOPs a token",
    "params_active": "parameters a token meets",
    "params": "parameters",
}


def study_html(report: Report) -> str:
    """A page of its own, which opens without a network.

    Args:
        report: what ``recipes.study.study`` found.

    Returns:
        The text of the page.

    >>> row = {"arm": "TopK", "overrides": [], "mean": {"bits_per_byte": 2.5}, "spread": {"bits_per_byte": 0.1}}
    >>> more = {"arm": "VQ", "mean": -0.1, "low": -0.2, "high": 0.0, "p_value": 0.01, "is_real": True}
    >>> values = {"recipe": "tiny", "steps": 9, "tokens": 9000, "seeds": [0, 1], "against": "TopK", "rows": [row]}
    >>> "needs fewer" in study_html(Report("compare", values | {"differences": [more], "hardware": {}}))
    True

    Source: none; plain bookkeeping.
    """
    rows, differences = report["rows"], report["differences"]
    shape = (
        f"recipe {report['recipe']}, {report['steps']} steps of {quantity(report['tokens'] / report['steps'])} tokens"
    )
    lead = f'<p class="lead">{escape(shape)}; {len(report["seeds"])} seeds, each with every arm</p>'
    title = f'<p class="eyebrow">a comparison</p><h1>{len(rows)} ways to route</h1>'
    head = f'<header><div class="inner">{title}{lead}</div></header>'
    against = escape(report["against"])
    about = "95 % of each by itself; dark where it is real among all of them"
    drawn = card(f"Bits per byte less those of {report['against']}", about, _intervals(differences))
    said = "".join(f"<li>{escape(line)}</li>" for line in _said(report["against"], differences))
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    how = table([[row["arm"], " ".join(row["overrides"]) or "as the recipe"] for row in rows])
    sections = [
        f'<section><h2>Against {against}</h2>{drawn}<ul class="lead">{said}{notes}</ul></section>',
        f"<section><h2>What it learnt, and how it routes</h2>{_table(rows, _LEARNT)}</section>",
        f"<section><h2>What it costs</h2>{_table(rows, _COST)}</section>",
        f"<section><h2>How each was trained</h2>{how}</section>",
        f"<section><h2>Where</h2>{table(list(flat(dict(report['hardware'])).items()))}</section>",
    ]
    return frame("routers compared", head, sections, experts=0, payload={"colors": 2, "charts": []})


def quantity_texts(row: Mapping[str, Any]) -> dict[str, str]:
    """Each quantity of an arm as text, with its spread where it has one; what it lacks is a dash."""
    found = {}
    for name in _LEARNT | _COST:
        mean, spread = row["mean"].get(name), row["spread"].get(name)
        if mean is None:
            found[name] = "–"
        elif name in _COST:
            found[name] = quantity(mean)
        else:
            found[name] = f"{mean:.3f}" + (f" ± {spread:.3f}" if name == "bits_per_byte" else "")
    return found


def _table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    lines = [[row["arm"], *(quantity_texts(row)[name] for name in columns)] for row in rows]
    return table(lines, "".join(f"<th>{said}</th>" for said in columns.values()))


def _said(against: str, differences: Sequence[Mapping[str, Any]]) -> list[str]:
    fewer = [one["arm"] for one in differences if one["is_real"] and one["mean"] < 0]
    more = [one["arm"] for one in differences if one["is_real"] and one["mean"] > 0]
    rest = [one["arm"] for one in differences if not one["is_real"]]
    lines = []
    for names, what in (
        (fewer, "needs fewer bits than"),
        (more, "needs more bits than"),
        (rest, "cannot be told from"),
    ):
        if names:
            lines.append(f"{', '.join(names)}: {what} {against}")
    return lines


def _intervals(differences: Sequence[Mapping[str, Any]]) -> str:
    """A line for each interval, sorted, with a dot at the difference and a rule at 0."""
    rows = sorted(differences, key=lambda one: one["mean"])
    low, high = min(0.0, *(one["low"] for one in rows)), max(0.0, *(one["high"] for one in rows))
    room = _WIDE - _LABEL - 90
    scale = room / ((high - low) or 1.0)
    zero = _LABEL + (0 - low) * scale
    tall = _ROW * len(rows) + 8
    parts = [f'<path class="grid" d="M{zero:.1f} 0V{tall}"/>']
    for number, one in enumerate(rows):
        y = _ROW * number + 16
        left, dot, right = (_LABEL + (one[name] - low) * scale for name in ("low", "mean", "high"))
        shade = "1" if one["is_real"] else "0.4"
        parts.append(f'<text x="0" y="{y + 4}">{escape(one["arm"])}</text>')
        parts.append(f'<g opacity="{shade}"><path class="line" stroke="currentColor" d="M{left:.1f} {y}H{right:.1f}"/>')
        parts.append(f'<circle cx="{dot:.1f}" cy="{y}" r="4" fill="currentColor"/></g>')
        parts.append(f'<text class="end" x="{_WIDE - 84}" y="{y + 4}">{one["mean"]:+.3f}</text>')
    summary = "; ".join(f"{one['arm']} {one['mean']:+.3f} ({one['low']:+.3f} to {one['high']:+.3f})" for one in rows)
    return f'<svg role="img" viewBox="0 0 {_WIDE} {tall}"><title>{escape(summary)}</title>{"".join(parts)}</svg>'
