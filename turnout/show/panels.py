"""The panels of the page that hold drawings: curves, expert load, domain maps, and the passage."""

import collections
import dataclasses
from collections.abc import Sequence
from html import escape

from turnout.measure.runs import Passage, RunData, number
from turnout.show.charts import Drawing, Series, domain_map, line_chart, load_chart
from turnout.show.palette import expert_color

__all__ = ["curves", "domains", "excerpt", "loads", "passage"]

# What keeps the page small whatever the model: the layers drawn, the numbers in all bands, the cells of all maps, the
# tokens of the passage, and the entries of its routes.
_LAYERS, _BAND_POINTS, _CELLS, _TOKENS, _ROUTES = 24, 16_000, 4_000, 1_500, 24_000


def curves(runs: Sequence[RunData], drawings: list[Drawing]) -> str:
    """Training loss and held-out bits per byte of all runs, by training tokens."""
    loss = [_series(run, n, "train", "loss", smooth=True) for n, run in enumerate(runs)]
    held = [_series(run, n, "eval", "bits_per_byte", smooth=False) for n, run in enumerate(runs)]
    panels = []
    for title, unit, series, digits in (
        ("Held-out text", "bits per byte", held, 3),
        ("Training loss", "nats a token, smoothed", loss, 3),
    ):
        known = [one for one in series if one.points]
        if not known:
            inside = _missing(f"No {title.lower()} was logged.")
        else:
            inside = _chart(line_chart(title, known, digits=digits), drawings)
        absent = [one.name for one in series if not one.points] if known else []
        note = f'<p class="small">Not logged by {escape(", ".join(absent))}.</p>' if absent else ""
        panels.append(_card(title, unit, inside + note))
    return (
        '<section><h2>Learning</h2><p class="about">By training tokens seen. Point at a curve for its values.</p>'
        f'<div class="two">{"".join(panels)}</div></section>'
    )


def loads(runs: Sequence[RunData], drawings: list[Drawing]) -> str:
    """The share of each expert in each layer, over the evaluations of each mixture-of-experts run."""
    groups, several = [], max(1, sum(1 for run in runs if run.num_experts))
    for run in runs:
        history = _history(run)
        if not history:
            continue
        layers = len(history[0][1])
        shown = _spread(layers, max(2, min(_LAYERS, 1600 // several // run.num_experts)))
        bands = sum(len(history[0][1][layer]) for layer in shown)
        points = _spread(len(history), max(4, _BAND_POINTS // several // bands))
        steps = [history[p][0] for p in points]
        panels = []
        for layer in shown:
            share_PE = [history[p][1][layer] for p in points]
            even = 1 / len(share_PE[0])
            violation = max(share_PE[-1]) / even - 1
            drawing = load_chart(f"layer {layer}", steps, share_PE)
            panels.append(_card(f"layer {layer}", f"MaxVio {violation:.2f}", _chart(drawing, drawings)))
        groups.append(_group(run, runs, f'<div class="many">{"".join(panels)}</div>', layers, shown))
    about = (
        "The share of held-out tokens that each expert of a layer receives, from the first evaluation to the last. "
        "The dotted lines are where the borders lie when all experts have the even share."
    )
    nothing = "No run logged the load of experts: they are dense, or have not been evaluated yet."
    return _section("Expert load over time", about, groups, nothing)


def domains(runs: Sequence[RunData], drawings: list[Drawing]) -> str:
    """How each domain's use of the experts deviates from the overall use, layer by layer."""
    groups, several = [], max(1, sum(1 for run in runs if run.num_experts))
    for run in runs:
        by_domain = {name: load for name, load in run.load_by_domain.items() if load}
        # One domain is the whole text: there is nothing to compare.
        if not run.load or len(by_domain) < 2:
            continue
        layers = len(run.load)
        shown = _spread(layers, max(1, min(_LAYERS, _CELLS // several // (len(by_domain) * run.num_experts))))
        panels = []
        for layer in shown:
            rows = [(name, load[layer]) for name, load in by_domain.items()]
            drawing = domain_map(f"layer {layer}", run.load[layer], rows)
            panels.append(_card(f"layer {layer}", "", _chart(drawing, drawings)))
        groups.append(_group(run, runs, f'<div class="two">{"".join(panels)}</div>', layers, shown))
    about = (
        "Which experts a domain uses more, or less, than text in general. Experts stand in the order of the domain "
        "that they favour."
    )
    legend = '<p class="small">a quarter of its share <span class="scale"></span> four times its share</p>'
    nothing = (
        "No load by domain to compare: the runs are dense, their text is of one domain, or no trace was recorded at "
        "their end."
    )
    return _section("Who reads what", about, [legend, *groups] if groups else [], nothing)


def excerpt(routed: Passage) -> Passage:
    """The beginning of a passage, and an even choice of its layers, that a page has room for."""
    entries = max(1, sum(len(token) for layer in routed.routes for token in layer))
    each = max(1.0, entries / max(1, len(routed.routes) * len(routed.tokens)))
    count = min(len(routed.tokens), _TOKENS, max(1, int(_ROUTES / each / min(len(routed.routes) or 1, 4))))
    shown = _spread(len(routed.routes), max(1, int(_ROUTES / each / max(count, 1))))
    return dataclasses.replace(
        routed,
        tokens=tuple(routed.tokens[:count]),
        routes=tuple(tuple(routed.routes[layer][:count]) for layer in shown),
        layers=tuple(routed.layers[layer] for layer in shown),
    )


def passage(routed: Passage | None, runs: Sequence[RunData]) -> str:
    """A held-out passage, each token on the colour of its first expert and underlined with its second."""
    title = "A passage, token by token"
    if routed is None or not routed.tokens or not routed.routes:
        dense = bool(runs) and not any(run.num_experts for run in runs)
        reason = "a dense model sends every token the same way" if dense else "none was recorded with its routes"
        return _section(title, "", [], f"No passage to show: {reason}.")
    whole, routed = routed, excerpt(routed)
    count = len(routed.tokens)
    words = "".join(map(_token, routed.tokens, routed.routes[0]))
    seen = collections.Counter(e for layer in routed.routes for token in layer for e, _, _ in token)
    chips = "".join(
        f'<button class="chip" data-expert="{e}" aria-pressed="false" style="--c:{expert_color(e)}" '
        f'title="expert {e}: {seen[e]} entries in this passage"><i></i>{e}</button>'
        for e in range(routed.num_experts)
    )
    origin = " · ".join(part for part in (routed.domain, routed.source) if part)
    about = (
        "Held-out text. The background is the expert with the largest weight, stronger the larger it is; the underline "
        "is the second one. Point at a token (or use the arrow keys) for its whole path, choose an expert to see only "
        "its tokens."
    )
    cuts = [f"the first {count} of {len(whole.tokens)} tokens"] if count < len(whole.tokens) else []
    layers = len(routed.layers), len(whole.layers)
    cuts += [f"{layers[0]} of {layers[1]} layers"] if layers[0] < layers[1] else []
    cut = f'<p class="small">This is {" and ".join(cuts)}.</p>' if cuts else ""
    inside = (
        f'<div class="card"><div class="caption"><h3>{escape(origin) or "held-out passage"}</h3>'
        f"<span>{count} tokens</span></div>"
        f'<div class="controls">{_layer_choice(routed.layers)}'
        f'<button id="numbers" aria-pressed="false">show numbers</button></div>'
        f'<div class="controls"><div class="choice">{chips}</div></div>'
        f'<div class="passage" tabindex="0" aria-label="passage">{words}</div>{cut}</div>'
    )
    return _section(title, about, [inside], "")


def _layer_choice(layers: Sequence[str]) -> str:
    if len(layers) > 12:
        options = "".join(f'<option value="{n}">layer {escape(name)}</option>' for n, name in enumerate(layers))
        return f'<select id="layer" aria-label="layer">{options}</select>'
    buttons = "".join(
        f'<button data-layer="{n}" aria-pressed="{"true" if n == 0 else "false"}">layer {escape(name)}</button>'
        for n, name in enumerate(layers)
    )
    return f'<div class="choice">{buttons}</div>'


def _token(text: str, route: Sequence[tuple[int, float, float | None]]) -> str:
    style = []
    if route:
        weight = max(0.0, min(1.0, route[0][1]))
        style = [f"--a:{expert_color(route[0][0])}", f"--w:{18 + 46 * weight:.0f}%"]
    if len(route) > 1:
        style.append(f"--b:{expert_color(route[1][0])}")
    return f'<span class="t" style="{";".join(style)}">{escape(text)}</span>'


def _series(run: RunData, color: int, kind: str, key: str, *, smooth: bool) -> Series:
    points = []
    for line in run.lines(kind):
        x, y = number(line.get("tokens", line.get("step"))), number(line.get(key))
        if x is not None and y is not None:
            points.append((x, y))
    points = [points[n] for n in _spread(len(points), 2000)]
    if not smooth or len(points) < 8:
        return Series(run.name, color, points)
    # An exponential mean over a thirtieth of the run, and over less at its start, where the loss falls fast.
    total, weight, smoothed = 0.0, 0.0, []
    for n, (x, y) in enumerate(points):
        keep = 1 - 1 / (1 + min(len(points) / 30, n / 8))
        total, weight = keep * total + y, keep * weight + 1
        smoothed.append((x, total / weight))
    thin = _spread(len(points), 400)
    return Series(run.name, color, [smoothed[n] for n in thin], [points[n] for n in thin])


def _history(run: RunData) -> list[tuple[float, Sequence[Sequence[float]]]]:
    """When, and the load of all layers then, of every evaluation with the shape of the last one."""
    found = []
    for line in run.lines("eval"):
        x, load = number(line.get("tokens", line.get("step"))), line.get("load")
        if x is not None and load and all(number(share) is not None for load_E in load for share in load_E):
            found.append((x, load))
    shapes = [[len(load_E) for load_E in load] for _, load in found]
    return [one for one, shape in zip(found, shapes, strict=True) if shape == shapes[-1] and all(shape)]


def _spread(count: int, most: int) -> list[int]:
    """At most ``most`` of ``range(count)``, evenly spread, with the first and the last."""
    if count <= most:
        return list(range(count))
    if most == 1:
        return [count - 1]
    return [round(n * (count - 1) / (most - 1)) for n in range(most)]


def _group(run: RunData, runs: Sequence[RunData], inside: str, layers: int, shown: Sequence[int]) -> str:
    several = sum(1 for one in runs if one.num_experts) > 1
    name = f'<p class="small"><b>{escape(run.name)}</b></p>' if several else ""
    part = f'<p class="small">{len(shown)} of {layers} layers are shown.</p>' if len(shown) < layers else ""
    return name + inside + part


def _section(title: str, about: str, groups: Sequence[str], nothing: str) -> str:
    if not groups:
        return f"<section><h2>{escape(title)}</h2>{_missing(nothing)}</section>"
    return f'<section><h2>{escape(title)}</h2><p class="about">{escape(about)}</p>{"".join(groups)}</section>'


def _card(title: str, note: str, inside: str) -> str:
    caption = f'<div class="caption"><h3>{escape(title)}</h3><span>{escape(note)}</span></div>'
    return f'<div class="card">{caption}{inside}</div>'


def _chart(drawing: Drawing, drawings: list[Drawing]) -> str:
    drawings.append(drawing)
    return f'<div data-chart="{len(drawings) - 1}">{drawing.svg}</div>'


def _missing(text: str) -> str:
    return f'<p class="missing">{escape(text)}</p>'
