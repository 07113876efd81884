"""The documentation as a site: every page of the repository, and an API page a room, made of the docstrings.

    python scripts/site_pages.py            builds build/site/html; a warning (a broken link, an argument that is
                                            described and not there) is an error
    python scripts/site_pages.py serve      shows it on a local port, and again after each change

Nothing is written twice: the pages are README.md, CONTRIBUTING.md, CHANGELOG.md and docs/, with their links set for
where they stand in the site; docs/api, which is for reading on a code host, gives way to pages with whole docstrings.
No network is needed, neither to build the site nor to read it.
"""

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import catalogue
from house import ROOT, STOREYS, Module, locate, read

PLACE = ROOT / "build" / "site"
# Pages outside docs, and what they are called in the site.
FRONT = {
    "README.md": "index.md",
    "examples/README.md": "examples.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
# The navigation: a heading, and its pages; "guides" and "api" are all pages in those folders.
NAVIGATION = (
    ("Start", "index.md"),
    ("Guides", "guides"),
    ("Examples", "examples.md"),
    ("Methods", "methods.md"),
    ("API", "api"),
    ("Performance", "performance.md"),
    ("Project", "architecture.md contributing.md changelog.md log.md"),
)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")


def site(root: Path = ROOT) -> dict[str, str]:
    """Every page of the site: its path below the folder of pages, and its Markdown."""
    table = {module.name: module for module in read(root)}
    sources = {root / name: page for name, page in FRONT.items()}
    documents = (path for path in sorted((root / "docs").rglob("*.md")) if path.parent.name != "api")
    sources |= {path: path.relative_to(root / "docs").as_posix() for path in documents}
    found = {"api/index.md": _rooms(table)}
    for room in sorted({module.room for module in table.values() if module.is_public}):
        found[f"api/{room}.md"] = _room(room, table)
    for path, page in sources.items():
        found[page] = _moved(path, page, sources | {root / "docs" / "api": "api/index.md"}, found, root)
    found["methods.md"] = _with_anchors(found["methods.md"], table)
    return found


# ---- pages of the repository


def _moved(path: Path, page: str, pages: Mapping[Path, str], found: dict[str, str], root: Path) -> str:
    """A page's text with its links as they are in the site; a linked file that is no page becomes one."""

    def link(match: re.Match[str]) -> str:
        target = (path.parent / match[1]).resolve()
        name = target.relative_to(root).as_posix()
        if target in pages:
            name = pages[target]
        elif name.startswith("docs/api/"):
            name = name.removeprefix("docs/")
        elif target.is_file():
            language = target.suffix.lstrip(".") or "text"
            name, text = f"source/{name}.md", target.read_text(encoding="utf-8")
            found[name] = f"# {target.name}\n\n`{target.relative_to(root)}`\n\n````{language}\n{text}````\n"
        else:
            raise SystemExit(f"{path.relative_to(root)}: {match[1]} leads to no page of the site")
        return os.path.relpath(name, Path(page).parent)

    parts = re.split(r"(^ *```.*?^ *```$)", path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for number, part in enumerate(parts):
        # Odd parts are fences. Their second word is for tests/test_docs.py, and no option of the site's.
        parts[number] = (
            re.sub(r"\A( *```\w+) [\w-]+$", r"\1", part, flags=re.MULTILINE) if number % 2 else _LINK.sub(link, part)
        )
    return "".join(parts)


def _with_anchors(text: str, table: Mapping[str, Module]) -> str:
    """The table of methods, each linked to its own place in the page of its room."""
    for method in catalogue.methods(table):
        plain = f"[`{method.name}`](api/{method.module.room}.md)"
        text = text.replace(plain, f"[`{method.name}`](api/{method.module.room}.md#{method.module.name}.{method.name})")
    return text


# ---- API pages


def _rooms(table: Mapping[str, Module]) -> str:
    """The rooms, from the top of the house down."""
    lines = ["# API", "", "Every public name, a page a room. What is deeper is not promised to stay.", ""]
    lines += ["| room | what is in it |", "|---|---|"]
    for rooms in reversed(STOREYS):
        for room in rooms:
            if module := table.get(f"turnout.{room}"):
                lines.append(f"| [`turnout.{room}`]({room}.md) | {module.summary} |")
    return "\n".join(lines) + "\n"


def _room(room: str, table: Mapping[str, Module]) -> str:
    """A room's page: its docstring, then what it lists; its floors as sections."""
    lines: list[str] = []
    for module, names in catalogue.sections(room, table):
        level = 1 if module.name.count(".") == 1 else 2
        lines += [f"{'#' * level} `{module.name}`", ""]
        lines += _directive(module.name, members=False, show_root_heading=False, show_root_toc_entry=False)
        for name in names:
            inner, node = locate(name, module, table) or (None, None)
            shown = {"heading": name, "toc_label": name, "heading_level": level + 1}
            if inner is not None and inner.tree is not node:
                lines += _directive(f"{inner.name}.{name}", **shown)
            elif inner is not None and not inner.is_public:  # a module; a floor has a section of its own
                lines += _directive(inner.name, members=False, **shown)
    return "\n".join(lines)


def _directive(path: str, **options: object) -> Iterator[str]:
    yield from (f"::: {path}", "    options:")
    yield from (f"      {name}: {json.dumps(value)}" for name, value in options.items())
    yield ""


# ---- writing, building, serving


def configuration(pages: Mapping[str, str]) -> str:
    """The site's configuration: where its pages are and in which order, then scripts/site.toml."""
    entries = []
    for heading, wanted in NAVIGATION:
        inside = [page for page in sorted(pages) if page.startswith(f"{wanted}/") or page in wanted.split()]
        inside.sort(key=lambda page: (not page.endswith("index.md"), wanted.find(page)))
        if inside:
            entries.append(f"  {{ {json.dumps(heading)} = {json.dumps(inside[0] if len(inside) == 1 else inside)} }},")
    lines = ["[project]", 'site_name = "turnout"', 'docs_dir = "pages"', 'site_dir = "html"', "nav = [", *entries, "]"]
    return "\n".join(lines) + "\n\n" + (ROOT / "scripts" / "site.toml").read_text(encoding="utf-8") + _PYTHON


_PYTHON = f"""
[project.plugins.mkdocstrings.handlers.python]
paths = [{json.dumps(str(ROOT))}]

[[project.plugins.mkdocstrings.handlers.python.options.extensions]]
{json.dumps(str(ROOT / "scripts" / "docstrings.py"))} = {{}}
"""


def write(place: Path, pages: Mapping[str, str]) -> None:
    """Puts the pages and the configuration there; files that are as they should be are left alone."""
    wanted = {place / "pages" / name: text for name, text in pages.items()}
    wanted[place / "zensical.toml"] = configuration(pages)
    for path in set((place / "pages").rglob("*.md")) - set(wanted):
        path.unlink()
    for path, text in wanted.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def build(place: Path) -> int:
    """Builds the site strictly; what reads the docstrings has warnings too, and they count."""
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(
        command, cwd=place, check=False, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, encoding="utf-8"
    )
    print(done.stdout, end="")
    if done.returncode == 0 and "griffe: " in done.stdout:
        print("a docstring describes what is not there: see the lines with griffe")
        return 1
    return done.returncode


def serve(place: Path, options: Sequence[str]) -> int:
    """Shows the site on a local port until Ctrl-C; pages are made again when what they come from changes."""
    threading.Thread(target=_follow, args=(place,), daemon=True).start()
    return subprocess.run([sys.executable, "-m", "zensical", "serve", *options], cwd=place, check=False).returncode


def _follow(place: Path) -> None:
    while True:
        time.sleep(1)
        write(place, site())


def main(arguments: Sequence[str]) -> int:
    """Builds the site, or serves it."""
    write(PLACE, site())
    if arguments[:1] == ["serve"]:
        return serve(PLACE, arguments[1:])
    if code := build(PLACE):
        return code
    print(f"the site is in {(PLACE / 'html').relative_to(ROOT)}: any web server can show it")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
