"""Docstrings as the site's Markdown: doctests in fences, the source of a method as a line of its own."""

import re

import griffe

# From ``>>>`` to the next empty line, or to a line that is indented less.
_DOCTEST = re.compile(r"^( *)>>> .*(?:\n\1.*\S.*)*", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Changes each docstring before it is parsed into sections."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Called for every module, class, function and attribute."""
        if obj.docstring:
            obj.docstring.value = markdown(obj.docstring.value)


def markdown(text: str) -> str:
    """The docstring with its doctests fenced, and its source marked."""
    text = _DOCTEST.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", text)
    return re.sub(r"^Source: ", "**Source:** ", text, flags=re.MULTILINE)
