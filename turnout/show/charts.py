"""The drawings of the page: each returns inline SVG, and what a script needs to say the values under the pointer."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from html import escape

from turnout.measure.report import quantity
from turnout.show.palette import expert_color, run_color

__all__ = ["Drawing", "Series", "domain_map", "line_chart", "load_chart", "tracks"]

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Drawing:
    """SVG text, and the JSON values that belong to it."""

    svg: str
    data: dict[str, object]


@dataclasses.dataclass(frozen=True)
class Series:
    """One line of a chart: its name, the number of its colour, its points, and the same before smoothing."""

    name: str
    color: int
    points: Sequence[Point]
    faint: Sequence[Point] = ()


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The plot's box in the drawing's units, and the range of values that it shows."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]

    def place(self, point: Point) -> Point:
        across = (point[0] - self.x[0]) / ((self.x[1] - self.x[0]) or 1)
        up = (point[1] - self.y[0]) / ((self.y[1] - self.y[0]) or 1)
        return self.left + across * self.width, self.top + (1 - up) * self.height

    def json(self) -> dict[str, object]:
        return dataclasses.asdict(self)


def line_chart(name: str, series: Sequence[Series], *, digits: int = 3, over: str = "tokens") -> Drawing:
    """Lines over training tokens or time, each labelled at its end; the steep start is cut off.

    Args:
        name: what the height is, with its unit.
        series: the lines; those without points are left out.
        digits: decimals of a value under the pointer.
        over: what is counted from left to right: "tokens", or a unit of time.
    """
    series = [one for one in series if one.points]
    low = min(y for one in series for _, y in one.points)
    # The first twentieth of a training run is so high that it would flatten everything after it.
    high = max(y for one in series for _, y in one.points[min(len(one.points) // 20, len(one.points) - 1) :])
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    right = 12 + 7.4 * max(len(_short(one.name)) for one in series)
    last = max(x for one in series for x, _ in one.points)
    frame = _Frame(44, 12, 560 - 44 - right, 252, (0, last or 1), (low - margin, high + margin))
    box = _id(f"{name} by {over}")
    parts = [_axes(frame, _bare if over == "tokens" else "{:g}".format), f'<g clip-path="url(#{box})">']
    for one in series:
        color = run_color(one.color)
        if one.faint:
            parts.append(f'<path class="faint" stroke="{color}" d="{_path(frame, one.faint)}"/>')
        parts.append(f'<path class="line" stroke="{color}" d="{_path(frame, one.points)}"/>')
        if len(one.points) < 40:
            parts += [_dot(frame.place(point), 2.5, color) for point in one.points]
    parts.append("</g>")
    ends = [(one, frame.place(one.points[-1])) for one in series]
    for (one, (x, _)), y in zip(ends, _apart([end[1] for _, end in ends], 15), strict=True):
        parts.append(_text(x + 8, y + 4, _short(one.name), f'class="end" style="fill:{run_color(one.color)}"'))
    summary = "; ".join(f"{one.name} ends at {one.points[-1][1]:.{digits}f}" for one in series)
    clip = f'<clipPath id="{box}"><rect x="{frame.left}" y="{frame.top - 4}" width="{frame.width + 4:.0f}" '
    clip += f'height="{frame.height + 8}"/></clipPath>'
    svg = _svg(560, 300, f"{name} by {over}: {summary}", f"<defs>{clip}</defs>{''.join(parts)}")
    lines = [{"name": one.name, "color": run_color(one.color), "points": _round(one.points)} for one in series]
    return Drawing(svg, {"kind": "lines", "frame": frame.json(), "digits": digits, "over": over, "series": lines})


def load_chart(name: str, steps: Sequence[float], share_PE: Sequence[Sequence[float]]) -> Drawing:
    """The shares of one layer's experts as bands over time; bands of one height mean an even load.

    Args:
        name: the layer's name.
        steps: (P,) where each evaluation lies on the time axis.
        share_PE: (P, E) the shares at each.
    """
    if len(steps) == 1:
        steps, share_PE = [steps[0], steps[0] + 1], [share_PE[0], share_PE[0]]
    experts = len(share_PE[0])
    frame = _Frame(6, 4, 268, 132, (steps[0], steps[-1]), (0, 1))
    below_P = [0.0] * len(steps)
    bands = []
    for e in range(experts):
        above_P = [below + share_E[e] for below, share_E in zip(below_P, share_PE, strict=True)]
        edge = [*zip(steps, above_P, strict=True), *reversed(list(zip(steps, below_P, strict=True)))]
        bands.append(f'<path fill="{expert_color(e)}" d="{_path(frame, edge)}Z"/>')
        below_P = above_P
    ticks = []
    for e in range(1, experts):
        y = frame.place((0, e / experts))[1]
        ticks.append(f'<path class="even" d="M2 {y:.1f}H6M274 {y:.1f}H278"/>')
        if experts <= 32:
            ticks.append(f'<path class="evenline" d="M6 {y:.1f}H274"/>')
    busiest = max(range(experts), key=lambda e: share_PE[-1][e])
    summary = f"{name}: at the end expert {busiest} has the largest share, {100 * share_PE[-1][busiest]:.1f} %"
    svg = _svg(280, 140, summary, f'<g class="bands">{"".join(bands)}</g>{"".join(ticks)}')
    shares = [[round(10000 * share) for share in share_E] for share_E in share_PE]
    return Drawing(svg, {"kind": "load", "frame": frame.json(), "name": name, "steps": list(steps), "shares": shares})


def domain_map(name: str, overall_E: Sequence[float], by_domain: Sequence[tuple[str, Sequence[float]]]) -> Drawing:
    """How much more (or less) of each domain's tokens an expert gets than of all tokens.

    Experts stand in the order of the domain that they favour, so that specialists form blocks.

    Args:
        name: the layer's name.
        overall_E: (E,) the share of each expert over all tokens.
        by_domain: each domain's name and its (E,) shares.
    """
    experts, labels = len(overall_E), 96
    ratio = [[_ratio(share, whole) for share, whole in zip(s, overall_E, strict=True)] for _, s in by_domain]

    def favour(e: int) -> tuple[int, float]:
        row = max(range(len(ratio)), key=lambda n: ratio[n][e])
        return row, -ratio[row][e]

    order = sorted(range(experts), key=favour)
    wide, high = (560 - labels - 4) / experts, 26
    gap = 1 if wide > 4 else 0
    parts = []
    for n, (domain, _) in enumerate(by_domain):
        parts.append(_text(labels - 8, n * high + 18, _short(domain), 'class="tick" text-anchor="end"'))
        for column, e in enumerate(order):
            strength = max(-2.0, min(2.0, ratio[n][e])) / 2
            box = f'x="{labels + column * wide:.1f}" y="{n * high + 1}" width="{wide - gap:.1f}" height="{high - 2}"'
            fill = "over" if strength > 0 else "under"
            parts.append(f'<rect class="{fill}" {box} fill-opacity="{abs(strength):.2f}"/>')
    bottom = len(by_domain) * high
    for column, e in enumerate(order):
        x = labels + column * wide
        chip = f'x="{x:.1f}" y="{bottom + 3}" width="{wide - gap:.1f}" height="4"'
        parts.append(f'<rect fill="{expert_color(e)}" {chip}/>')
        if experts <= 32:
            parts.append(_text(x + wide / 2, bottom + 20, str(e), 'class="tick small" text-anchor="middle"'))
    best = max(((ratio[n][e], n, e) for n in range(len(ratio)) for e in range(experts)), default=(0.0, 0, 0))
    summary = f"{name}: expert {best[2]} is used most above its share, for {by_domain[best[1]][0]}"
    height = bottom + (26 if experts <= 32 else 10)
    svg = _svg(560, height, summary, "".join(parts))
    frame = _Frame(labels, 0, wide * experts, bottom, (0, experts), (0, 1))
    shares = [[round(10000 * share_E[e]) for e in order] for _, share_E in by_domain]
    data: dict[str, object] = {
        "kind": "domains",
        "frame": frame.json(),
        "name": name,
        "experts": order,
        "shares": shares,
    }
    names = [domain for domain, _ in by_domain]
    return Drawing(svg, data | {"domains": names, "overall": [round(10000 * overall_E[e]) for e in order]})


def tracks(num_experts: int, taken: Sequence[int]) -> str:
    """The ornament of the heading: one track that divides into as many as there are experts, two of them taken."""
    shown = max(2, min(num_experts or 5, 24))
    parts = []
    order = [e for e in range(shown) if e not in taken] + [e for e in taken if e < shown]
    for e in order:
        y = 6 + e * 108 / (shown - 1)
        style = 'class="taken"' if e in taken else 'class="idle"'
        color = expert_color(e) if num_experts else "var(--muted)"
        parts.append(f'<path {style} stroke="{color}" d="M0 60H70C170 60 170 {y:.1f} 280 {y:.1f}H600"/>')
    box = 'viewBox="0 0 600 120" preserveAspectRatio="none" aria-hidden="true"'
    return f'<svg class="tracks" {box}>{"".join(parts)}</svg>'


def _ratio(share: float, whole: float) -> float:
    """log2(share / whole), bounded; 0 for an expert that gets nothing anywhere."""
    if whole <= 0:
        return 0.0
    return math.log2(max(share / whole, 1 / 64))


def _axes(frame: _Frame, shown: Callable[[float], str]) -> str:
    parts = []
    for value in _nice(*frame.y, 5):
        y = frame.place((0, value))[1]
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{frame.left + frame.width:.1f}"/>')
        parts.append(_text(frame.left - 8, y + 4, f"{value:g}", 'class="tick" text-anchor="end"'))
    for value in _nice(*frame.x, 5):
        x = frame.place((value, 0))[0]
        text = _text(x, frame.top + frame.height + 20, shown(value), 'class="tick" text-anchor="middle"')
        parts.append(text)
    return "".join(parts)


def _bare(value: float) -> str:
    """A count on an axis: as short as it can be."""
    figure, space, letter = quantity(value).partition(" ")
    return (figure.rstrip("0").rstrip(".") if "." in figure else figure) + space + letter


def _nice(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round numbers from low to high."""
    rough = (high - low) / count
    size = 10 ** math.floor(math.log10(rough)) if rough > 0 else 1.0
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough or factor == 10)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _apart(heights: Sequence[float], distance: float) -> list[float]:
    """The heights, moved down where they must be so that no two are nearer than ``distance``."""
    placed = list(heights)
    order = sorted(range(len(placed)), key=placed.__getitem__)
    for before, after in itertools.pairwise(order):
        placed[after] = max(placed[after], placed[before] + distance)
    return placed


def _path(frame: _Frame, points: Sequence[Point]) -> str:
    places = (frame.place(point) for point in points)
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)


def _dot(place: Point, radius: float, color: str) -> str:
    return f'<circle cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="{radius}" fill="{color}"/>'


def _text(x: float, y: float, text: str, attributes: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {attributes}>{escape(text)}</text>'


def _svg(width: float, height: float, summary: str, inside: str) -> str:
    return f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(summary)}">{inside}</svg>'


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"


def _id(name: str) -> str:
    return "clip-" + "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in name)


def _round(points: Sequence[Point]) -> list[list[float]]:
    return [[round(x, 3), round(y, 5)] for x, y in points]
