"""The page itself: one document with its style, script and data, that asks nobody but the server it came from."""

from collections.abc import Mapping
from html import escape
from importlib import resources

from turnout.show import palette
from turnout.show.page import embedded, source_hash

__all__ = ["document", "policy"]


def document(data: Mapping[str, object]) -> str:
    """The text of the page.

    Args:
        data: what the script reads: ``model``, ``models``, ``experts``, and ``trace`` where it shows a recorded one.

    >>> "<script" in document({"model": "moe", "models": ["moe"], "experts": [8]})
    True

    Source: none; plain bookkeeping.
    """
    text = embedded({**data, "colors": palette.EXPERTS})
    style, script = _style(), _asset("page.js")
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en">',
            "<head>",
            '<meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy()}">',
            '<link rel="icon" href="data:,">',
            f"<title>{escape(str(data.get('model', 'turnout')))} - turnout</title>",
            f"<style>{style}</style>",
            "</head>",
            "<body>",
            _asset("page.html"),
            f'<script type="application/json" id="data">{text}</script>',
            f"<script>{script}</script>",
            "</body>",
            "</html>",
            "",
        ]
    )


def policy() -> str:
    """What a browser lets the page do: its own style and script, and asking the server that it came from.

    >>> "unsafe" in policy()
    False

    Source: W3C, Content Security Policy Level 3.
    """
    own = f"style-src {source_hash(_style())}; script-src {source_hash(_asset('page.js'))}"
    return f"default-src 'none'; {own}; connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'"


def _style() -> str:
    shown = resources.files("turnout.show").joinpath("page.css").read_text(encoding="utf-8")
    return palette.css(palette.EXPERTS) + shown + _asset("page.css")


def _asset(name: str) -> str:
    return resources.files("turnout.serve.viewer").joinpath(name).read_text(encoding="utf-8")
