"""What every page is made of: its frame with style, script and drawings, and the small parts of its sections."""

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from importlib import resources

from turnout import __version__
from turnout.show import palette

__all__ = ["card", "dot", "embedded", "flat", "fold", "frame", "missing", "section", "source_hash", "table"]


def frame(title: str, head: str, sections: Sequence[str], *, experts: int, payload: object) -> str:
    """The text of a page that asks no network for anything; its content security policy forbids it.

    Args:
        title: of the window.
        head: the ``<header>``.
        sections: the others, in their order.
        experts: how many have colours.
        payload: what the script reads, as JSON.
    """
    style, script = _asset("page.css"), _asset("page.js")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">',
            f"<title>{escape(title)}</title>",
            f"<style>{palette.css(experts)}{style}</style>",
            "</head>",
            "<body>",
            head,
            "<main>",
            *sections,
            "</main>",
            f"<footer>Made by turnout {escape(__version__)}. This file holds everything it shows.</footer>",
            '<div id="tip" role="status" hidden></div>',
            f'<script type="application/json" id="data">{embedded(payload)}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def fold(title: str, inside: str, *, opened: bool = False) -> str:
    """A part that opens when its title is chosen."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{inside}</details>"


def section(title: str, about: str, groups: Sequence[str], nothing: str) -> str:
    """A section of its groups, which are html; ``nothing`` says why where there are none."""
    if not groups:
        return f"<section><h2>{escape(title)}</h2>{missing(nothing)}</section>"
    return f'<section><h2>{escape(title)}</h2><p class="about">{escape(about)}</p>{"".join(groups)}</section>'


def card(title: str, note: str, inside: str) -> str:
    """A box with a title and a word beside it; ``inside`` is html."""
    caption = f'<div class="caption"><h3>{escape(title)}</h3><span>{escape(note)}</span></div>'
    return f'<div class="card">{caption}{inside}</div>'


def missing(text: str) -> str:
    """What is not there, and why."""
    return f'<p class="missing">{escape(text)}</p>'


def table(rows: Sequence[Sequence[str]], head: str = "") -> str:
    """A table of texts; ``head`` is html."""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    top = f"<thead><tr><th></th>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="left">{top}<tbody>{body}</tbody></table></div>'


def flat(value: object, prefix: str = "") -> dict[str, str]:
    """Nested values by their dotted names, as text."""
    found: dict[str, str] = {}
    for key, item in value.items() if isinstance(value, dict) else ():
        if isinstance(item, dict) and item:
            found |= flat(item, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = item if isinstance(item, str) else json.dumps(item)
    return found


def dot(run: int) -> str:
    """The mark of a run's colour."""
    return f'<i class="dot" style="--c:{palette.run_color(run)}"></i>'


def embedded(payload: object) -> str:
    """JSON that no text in it can close: every character that HTML could read is written as an escape."""
    text = json.dumps(payload, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def source_hash(text: str) -> str:
    """What a content security policy calls a script or a style by."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _policy(script: str) -> str:
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {source_hash(script)}"


def _asset(name: str) -> str:
    return resources.files("turnout.show").joinpath(name).read_text(encoding="utf-8")
