"""The panels of the page that hold drawings: curves, expert load and domain maps."""

from collections.abc import Sequence
from html import escape

from turnout.measure.ranking import one_machine
from turnout.measure.runs import RunData, number
from turnout.show.charts import Drawing, Series, domain_map, line_chart, load_chart
from turnout.show.page import card, missing, section

__all__ = ["curves", "domains", "loads", "spread_evenly"]

# What keeps the page small whatever the model: the layers drawn, the numbers in all bands, the cells of all maps.
_LAYERS, _BAND_POINTS, _CELLS = 24, 16_000, 4_000
_UNITS = {"seconds": 1.0, "minutes": 60.0, "hours": 3600.0}


def curves(runs: Sequence[RunData], drawings: list[Drawing]) -> str:
    """Held-out bits per byte and training loss of all runs, by training tokens and by time."""
    timed = [run for run in runs if run.seconds]
    unit = _unit(max((run.seconds or 0.0 for run in runs), default=0.0))
    panels = []
    for title, kind, key, note in (
        ("Held-out text", "eval", "bits_per_byte", "bits per byte"),
        ("Training loss", "train", "loss", "nats a token, smoothed"),
    ):
        for axis, over in (("tokens", "tokens"), ("seconds", unit))[: 2 if timed else 1]:
            scale = 1.0 if axis == "tokens" else 1 / _UNITS[unit]
            lines = [_series(run, n, kind, (axis, key), scale, smooth=kind == "train") for n, run in enumerate(runs)]
            known = [one for one in lines if one.points]
            if known:
                inside = _chart(line_chart(f"{title}, {note}", known, over=over), drawings)
            else:
                inside = missing(f"No {title.lower()} was logged.")
            absent = [one.name for one in lines if not one.points] if known else []
            inside += f'<p class="small">Not logged by {escape(", ".join(absent))}.</p>' if absent else ""
            panels.append(card(f"{title} by {over}", note, inside))
    about = "By training tokens seen" + ("." if timed else "; no time was logged.")
    if timed:
        about = "By training tokens seen, and by the time taken: with evaluations and checkpoints, without pauses."
    if len(timed) > 1 and not one_machine(timed):
        about += " The runs are of different machines or numbers of threads: their times do not compare."
    inside = f'<div class="two">{"".join(panels)}</div>'
    return section("Learning", f"{about} Point at a curve for its values.", [inside], "")


def _unit(longest: float) -> str:
    """The unit in which a time of so many seconds is read."""
    return "seconds" if longest < 120 else "minutes" if longest < 7200 else "hours"


def loads(runs: Sequence[RunData], drawings: list[Drawing]) -> str:
    """The share of each expert in each layer, over the evaluations of each mixture-of-experts run."""
    groups, several = [], max(1, sum(1 for run in runs if run.num_experts))
    for run in runs:
        history = _history(run)
        if not history:
            continue
        layers = len(history[0][1])
        shown = spread_evenly(layers, max(2, min(_LAYERS, 1600 // several // run.num_experts)))
        bands = sum(len(history[0][1][layer]) for layer in shown)
        points = spread_evenly(len(history), max(4, _BAND_POINTS // several // bands))
        steps = [history[p][0] for p in points]
        panels = []
        for layer in shown:
            share_PE = [history[p][1][layer] for p in points]
            even = 1 / len(share_PE[0])
            violation = max(share_PE[-1]) / even - 1
            drawing = load_chart(f"layer {layer}", steps, share_PE)
            panels.append(card(f"layer {layer}", f"MaxVio {violation:.2f}", _chart(drawing, drawings)))
        groups.append(_group(run, runs, f'<div class="many">{"".join(panels)}</div>', layers, shown))
    about = (
        "The share of held-out tokens that each expert of a layer receives, from the first evaluation to the last. "
        "The dotted lines are where the borders lie when all experts have the even share."
    )
    nothing = "No run logged the load of experts: they are dense, or have not been evaluated yet."
    return section("Expert load over time", about, groups, nothing)


def domains(runs: Sequence[RunData], drawings: list[Drawing]) -> str:
    """How each domain's use of the experts deviates from the overall use, layer by layer."""
    groups, several = [], max(1, sum(1 for run in runs if run.num_experts))
    for run in runs:
        by_domain = {name: load for name, load in run.load_by_domain.items() if load}
        # One domain is the whole text: there is nothing to compare.
        if not run.load or len(by_domain) < 2:
            continue
        layers = len(run.load)
        shown = spread_evenly(layers, max(1, min(_LAYERS, _CELLS // several // (len(by_domain) * run.num_experts))))
        panels = []
        for layer in shown:
            rows = [(name, load[layer]) for name, load in by_domain.items()]
            drawing = domain_map(f"layer {layer}", run.load[layer], rows)
            panels.append(card(f"layer {layer}", "", _chart(drawing, drawings)))
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
    return section("Who reads what", about, [legend, *groups] if groups else [], nothing)


def _series(run: RunData, color: int, kind: str, keys: tuple[str, str], scale: float, *, smooth: bool) -> Series:
    """The values of a run by tokens or by seconds, the latter times ``scale``."""
    points = []
    for line in run.lines(kind):
        x = number(line.get(keys[0], line.get("step") if keys[0] == "tokens" else None))
        y = number(line.get(keys[1]))
        if x is not None and y is not None:
            points.append((scale * x, y))
    points = [points[n] for n in spread_evenly(len(points), 2000)]
    if not smooth or len(points) < 8:
        return Series(run.name, color, points)
    # An exponential mean over a thirtieth of the run, and over less at its start, where the loss falls fast.
    total, weight, smoothed = 0.0, 0.0, []
    for n, (x, y) in enumerate(points):
        keep = 1 - 1 / (1 + min(len(points) / 30, n / 8))
        total, weight = keep * total + y, keep * weight + 1
        smoothed.append((x, total / weight))
    thin = spread_evenly(len(points), 400)
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


def spread_evenly(count: int, most: int) -> list[int]:
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


def _chart(drawing: Drawing, drawings: list[Drawing]) -> str:
    drawings.append(drawing)
    return f'<div data-chart="{len(drawings) - 1}">{drawing.svg}</div>'
