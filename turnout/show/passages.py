"""Held-out passages token by token, one of them at a time, each token in the colour of its experts."""

import collections
import dataclasses
from collections.abc import Sequence
from html import escape

from turnout.measure.passage import Passage
from turnout.measure.runs import RunData
from turnout.show.page import section
from turnout.show.palette import expert_color
from turnout.show.panels import spread_evenly

__all__ = ["excerpts", "passages", "payload"]

# What keeps the page small whatever the model and however many passages: their tokens, and the entries of all routes.
_TOKENS, _ROUTES = 1_500, 24_000


def excerpts(found: Sequence[Passage]) -> list[Passage]:
    """The beginnings of passages of one model, and an even choice of its layers, that a page has room for together.

    Those without tokens or routes are left out, and those of other layers than the first.
    """
    found = [one for one in found if one.tokens and one.routes]
    found = [one for one in found if one.layers == found[0].layers]
    if not found:
        return []
    entries = sum(len(token) for one in found for layer in one.routes for token in layer)
    each = max(1.0, entries / sum(len(one.routes) * len(one.tokens) for one in found))
    layers, room = len(found[0].routes), _ROUTES / each / len(found)
    count = min(max(len(one.tokens) for one in found), _TOKENS // len(found) or 1, max(1, int(room / min(layers, 4))))
    shown = spread_evenly(layers, max(1, int(room / count)))
    return [
        dataclasses.replace(
            one,
            tokens=tuple(one.tokens[:count]),
            routes=tuple(tuple(one.routes[layer][:count]) for layer in shown),
            layers=tuple(one.layers[layer] for layer in shown),
        )
        for one in found
    ]


def payload(found: Sequence[Passage]) -> list[dict[str, object]]:
    """What the script reads of excerpts."""
    return [
        {
            "title": _title(one),
            "tokens": one.tokens,
            "routes": [
                [[(e, round(w, 3), None if s is None else round(s, 3)) for e, w, s in token] for token in layer]
                for layer in one.routes
            ],
            "layers": one.layers,
        }
        for one in found
    ]


def passages(found: Sequence[Passage], runs: Sequence[RunData]) -> str:
    """The first passage, each token on the colour of its first expert and underlined with its second; and a choice."""
    title, shown = "A passage, token by token", excerpts(found)
    if not shown:
        dense = bool(runs) and not any(run.num_experts for run in runs)
        reason = "a dense model sends every token the same way" if dense else "none was recorded with its routes"
        return section(title, "", [], f"No passage to show: {reason}.")
    first = shown[0]
    words = "".join(map(_token, first.tokens, first.routes[0]))
    seen = collections.Counter(e for layer in first.routes for token in layer for e, _, _ in token)
    chips = "".join(
        f'<button class="chip" data-expert="{e}" aria-pressed="false" style="--c:{expert_color(e)}" '
        f'title="expert {e}: {seen[e]} entries in this passage"><i></i>{e}</button>'
        for e in range(max(one.num_experts for one in shown))
    )
    about = (
        "Held-out text. The background is the expert with the largest weight, stronger the larger it is; the underline "
        "is the second one. Point at a token (or use the arrow keys) for its whole path, choose an expert to see only "
        "its tokens."
    )
    inside = (
        f'<div class="card"><div class="caption"><h3 id="origin">{escape(_title(first))}</h3>'
        f'<span id="count">{len(first.tokens)} tokens</span></div>{_passage_choice(shown)}'
        f'<div class="controls">{_layer_choice(first.layers)}'
        f'<button id="numbers" aria-pressed="false">show numbers</button></div>'
        f'<div class="controls"><div class="choice">{chips}</div></div>'
        f'<div class="passage" tabindex="0" aria-label="passage">{words}</div>{_cut(found, shown)}</div>'
    )
    return section(title, about, [inside], "")


def _cut(found: Sequence[Passage], shown: Sequence[Passage]) -> str:
    """What of the passages has no room."""
    longest, layers = max(len(one.tokens) for one in found), len(found[0].layers)
    count = max(len(one.tokens) for one in shown)
    cuts = [f"the first {count} of up to {longest} tokens"] if count < longest else []
    cuts += [f"{len(shown[0].layers)} of {layers} layers"] if len(shown[0].layers) < layers else []
    return f'<p class="small">Shown: {" and ".join(cuts)}.</p>' if cuts else ""


def _title(one: Passage) -> str:
    return " · ".join(part for part in (one.domain, one.source) if part) or "held-out passage"


def _passage_choice(shown: Sequence[Passage]) -> str:
    if len(shown) < 2:
        return ""
    buttons = "".join(
        f'<button data-passage="{n}" aria-pressed="{"true" if n == 0 else "false"}">{escape(_title(one))}</button>'
        for n, one in enumerate(shown)
    )
    return f'<div class="controls"><div class="choice">{buttons}</div></div>'


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
