"""Still drawings of the page of a conversion: bars before and after, shares of experts, how far layers are apart."""

import math
from collections.abc import Sequence
from html import escape

from turnout.show.palette import expert_color, run_color

__all__ = ["expert_cells", "gap_bars", "pair_bars", "share_bars", "value_bars"]

_WIDE, _LABEL = 560, 166
# What is drawn of layers that are equal to the bit, and of those that are not finite.
_LEAST, _MOST = 1e-9, 1e3


def pair_bars(rows: Sequence[tuple[str, float, float, str, str]]) -> str:
    """For each quantity a bar before and one after, the longer of the two as long as the drawing is wide.

    Args:
        rows: (name, before, after, before as text, after as text).
    """
    parts, room = [], _WIDE - _LABEL - 96
    for n, (name, before, after, *shown) in enumerate(rows):
        top, most = n * 46, max(before, after) or 1
        parts.append(_text(0, top + 24, name, ""))
        for k, value in enumerate((before, after)):
            wide = max(1.5, room * value / most)
            box = f'x="{_LABEL}" y="{top + 6 + 17 * k}" width="{wide:.1f}" height="13" rx="2"'
            parts.append(f'<rect style="fill:{run_color(k)}" {box}/>')
            parts.append(_text(_LABEL + wide + 8, top + 17 + 17 * k, shown[k], 'class="end"'))
    summary = "; ".join(f"{name}: {before} before, {after} after" for name, _, _, before, after in rows)
    return _svg(46 * len(rows), summary, parts)


def value_bars(rows: Sequence[tuple[str, float, str, int]]) -> str:
    """A bar for each value, from zero to the largest.

    Args:
        rows: (name, value, value as text, the number that decides about its colour as a run's).
    """
    parts, most = [], max((value for _, value, _, _ in rows), default=1.0) or 1.0
    for n, (name, value, shown, colour) in enumerate(rows):
        wide = max(1.5, (_WIDE - _LABEL - 96) * value / most)
        parts.append(_text(0, 26 * n + 16, _short(name, 24), ""))
        box = f'x="{_LABEL}" y="{26 * n + 4}" width="{wide:.1f}" height="16" rx="2"'
        parts.append(f'<rect style="fill:{run_color(colour)}" {box}/>')
        parts.append(_text(_LABEL + wide + 8, 26 * n + 16, shown, 'class="end"'))
    summary = "; ".join(f"{name}: {shown}" for name, _, shown, _ in rows)
    return _svg(26 * len(rows) or 1, summary, parts)


def share_bars(rows: Sequence[tuple[str, Sequence[float], Sequence[int]]]) -> str:
    """For each layer the shares of its experts, side by side.

    Args:
        rows: (layer, (E,) shares, (E,) the experts' numbers, which decide about their colours).
    """
    parts, left = [], 74.0
    for n, (name, share_E, number_E) in enumerate(rows):
        parts.append(_text(0, 24 * n + 15, _short(name, 10), ""))
        x, room = left, _WIDE - left
        for share, number in zip(share_E, number_E, strict=True):
            box = f'x="{x:.1f}" y="{24 * n + 2}" width="{max(0.0, room * share):.1f}" height="18"'
            about = f"{name}, expert {number}: {100 * share:.1f} %"
            parts.append(f'<rect style="fill:{expert_color(number)}" {box}><title>{escape(about)}</title></rect>')
            x += room * share
        for k in range(1, len(share_E)):
            line = left + room * k / len(share_E)
            parts.append(f'<path class="evenline" d="M{line:.1f} {24 * n + 2}v18"/>' if len(share_E) <= 32 else "")
    summary = "; ".join(f"{name}: {', '.join(f'{100 * s:.0f} %' for s in share_E)}" for name, share_E, _ in rows[:4])
    return _svg(24 * len(rows) or 1, f"Shares of experts. {summary}", parts)


def expert_cells(rows: Sequence[tuple[str, Sequence[tuple[int | None, float, str]]]]) -> str:
    """For each layer a cell an expert: its colour, its strength, and a word about it; hollow where it is gone.

    Args:
        rows: (layer, cells); a cell is (number that decides about its colour or None, strength in [0, 1], about it).
    """
    parts, left, many = [], 74.0, max((len(cells) for _, cells in rows), default=1)
    step = min(40.0, (_WIDE - left) / many)
    for n, (name, cells) in enumerate(rows):
        parts.append(_text(0, 24 * n + 15, _short(name, 10), ""))
        for e, (number, strength, about) in enumerate(cells):
            x, y = left + e * step, 24 * n + 2
            box = f'x="{x + 0.5:.1f}" y="{y + 0.5}" width="{max(1.0, step - 3):.1f}" height="17" rx="3"'
            title = f"<title>{escape(f'{name}, expert {e}: {about}')}</title>"
            if number is None:
                parts.append(f'<rect class="gone" {box}>{title}</rect>')
            else:
                fill = f"fill:{expert_color(number)};fill-opacity:{0.35 + 0.65 * min(1.0, max(0.0, strength)):.2f}"
                parts.append(f'<rect style="{fill}" {box}>{title}</rect>')
            if step >= 20:
                kind = "gone" if number is None else "strong" if strength > 0.6 else "weak"
                where = f'class="cell {kind}" text-anchor="middle"'
                parts.append(_text(x + (step - 2) / 2, y + 13.5, str(e if number is None else number), where))
    return _svg(24 * len(rows) or 1, f"Experts of {len(rows)} layers", parts)


def gap_bars(rows: Sequence[tuple[str, float | None]], bound: float) -> str:
    """How far the output of each layer is apart, on a logarithmic scale, and where the bound lies.

    Args:
        rows: (layer, relative difference; None where it is not finite).
        bound: the largest that counts as equal.
    """
    known = [value for _, value in rows if value is not None]
    low = math.log10(_LEAST)
    high = math.log10(min(_MOST, max([10 * bound, *known, 10 * _LEAST])))
    room, left, bottom = _WIDE - 74.0 - 70, 74.0, 24 * len(rows)

    def place(value: float | None) -> float:
        log = high if value is None else math.log10(max(_LEAST, min(_MOST, value)))
        return room * (log - low) / (high - low)

    parts = []
    for n, (name, value) in enumerate(rows):
        far = value is None or value > bound
        parts.append(_text(0, 24 * n + 15, _short(name, 10), ""))
        box = f'x="{left}" y="{24 * n + 4}" width="{max(1.5, place(value)):.1f}" height="14" rx="2"'
        parts.append(f'<rect class="{"over" if far else "under"}" {box}/>')
        shown = "not finite" if value is None else "0" if value == 0 else f"{value:.2g}"
        parts.append(_text(left + max(1.5, place(value)) + 8, 24 * n + 15, shown, 'class="end"'))
    line = left + place(bound)
    parts.append(f'<path class="cross" d="M{line:.1f} 0V{bottom + 4}"/>')
    parts.append(_text(line, bottom + 18, f"bound {bound:.0e}", 'class="tick" text-anchor="middle"'))
    summary = "; ".join(f"{name}: {'not finite' if value is None else f'{value:.2g}'}" for name, value in rows)
    return _svg(bottom + 24, f"How far layers are apart. {summary}", parts)


def _svg(height: float, summary: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDE} {height}" role="img" aria-label="{escape(summary)}">{"".join(parts)}</svg>'


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'


def _short(name: str, most: int) -> str:
    return name if len(name) <= most else "…" + name[1 - most :]
