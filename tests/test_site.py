"""The site holds every page and every public name, its links lead somewhere, and a strict build of it succeeds.

A strict build runs in CI, like every slow test; a broken link, a missing anchor, a name that is not there and an
argument that is described and not taken each fail it, which is tried here too.
"""

import importlib.util
import os
import re
from pathlib import Path

import pytest

import site_pages
from house import ROOT, listed, read


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    """The pages of this repository."""
    return site_pages.site()


def test_every_page_of_the_repository_is_there(pages: dict[str, str]) -> None:
    """What a reader finds on the code host is in the site, under its own name."""
    documents = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert {*documents, "index.md", "examples.md", "changelog.md", "contributing.md", "api/index.md"} <= set(pages)
    shown = re.findall(r'"([\w/.-]+\.md)"', site_pages.configuration(pages))
    assert sorted(shown) == sorted(page for page in pages if not page.startswith("source/"))


def test_every_public_name_is_documented(pages: dict[str, str]) -> None:
    """Each name in the ``__all__`` of a room or a floor has its place in the room's page."""
    for module in read():
        if module.is_public:
            text = pages[f"api/{module.room}.md"]
            missing = [
                n for n in listed(module) or [] if f'heading: "{n}"' not in text and f"`{module.name}.{n}`" not in text
            ]
            assert not missing, f"{module.name}: {missing}"


def test_links_lead_to_pages(pages: dict[str, str]) -> None:
    """Every relative link, seen from where its page stands."""
    for page, whole in pages.items():
        text = re.sub(r"^ *```.*?^ *````?$", "", whole, flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", text):
            assert os.path.normpath(Path(page).parent / link) in pages, f"{page}: {link}"


def test_links_are_moved(tmp_path: Path) -> None:
    """A page is linked as a page, another file becomes one, code is left alone, and what is gone is named."""
    (tmp_path / "docs" / "guides").mkdir(parents=True)
    (tmp_path / "turnout").mkdir()
    (tmp_path / "run.py").write_text("x = 1\n")
    (tmp_path / "README.md").write_text(
        "[a](docs/guides/a.md#b) [r](run.py) [w](https://x.org)\n```python slow\n[a](b)\n```\n"
    )
    (tmp_path / "docs" / "guides" / "a.md").write_text("# A\n## B\n[home](../../README.md) [here](#b)\n")
    (tmp_path / "docs" / "methods.md").write_text("# M\n")
    (tmp_path / "examples").mkdir()
    for name in ("CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md"):
        (tmp_path / name).write_text("# C\n")
    found = site_pages.site(tmp_path)
    wanted = "[a](guides/a.md#b) [r](source/run.py.md) [w](https://x.org)\n```python\n[a](b)\n```\n"
    assert found["index.md"] == wanted
    assert found["guides/a.md"] == "# A\n## B\n[home](../index.md) [here](#b)\n"
    assert "x = 1" in found["source/run.py.md"]
    (tmp_path / "README.md").write_text("[a](docs/gone.md)\n")
    with pytest.raises(SystemExit, match=r"README.md: docs/gone.md leads to no page"):
        site_pages.site(tmp_path)


# ---- with the site's generator, which the extra "docs" installs


@pytest.mark.slow
def test_the_site_builds_strictly(pages: dict[str, str], tmp_path: Path) -> None:
    """Without a warning; its pages load nothing from another host, and say what the docstrings say."""
    site_pages.write(tmp_path, pages)
    assert site_pages.build(tmp_path) == 0
    html = {path.relative_to(tmp_path / "html").as_posix(): path for path in (tmp_path / "html").rglob("*.html")}
    assert len(html) > len(pages)
    for path in html.values():
        loaded = re.findall(
            r'<(?:script|img|iframe)[^>]+src="(\w+:)?//|<link[^>]+href="(\w+:)?//', path.read_text("utf-8")
        )
        assert not loaded, path
    upcycle = (
        html["api/reshape/index.html"].read_text("utf-8").partition('id="turnout.reshape.to_sparse.upcycle.upcycle"')[2]
    )
    upcycle = re.sub(r"<[^>]+>", "", upcycle.partition("<details")[0])
    for part in (
        "num_experts",
        "Parameters:",
        "Returns:",
        "Raises:",
        "UsageError",
        "&gt;&gt;&gt; ",
        "Komatsuzaki et al., 2023",
    ):
        assert part in upcycle
    assert "Sparse Upcycling" in (tmp_path / "html" / "search.json").read_text("utf-8")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[gone](nowhere.md)", "page does not exist"),
        ("[gone](#nowhere)", "anchor does not exist"),
        ("[gone][turnout.nowhere]", "unresolved"),
        ("::: broken.nowhere", "could not be found"),
        ("::: broken.described", "does not appear in the function signature"),
        ("::: broken.sound", ""),
    ],
)
def test_a_strict_build_can_fail(text: str, says: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One page with one fault, or none."""
    source = '''"""A module."""
def described(x: int) -> None:
    """Does.

    Args:
        y: what it does not take.
    """
def sound(x: int) -> None:
    """Does.

    Args:
        x: what it takes.
    """
'''
    (tmp_path / "broken.py").write_text(source)
    site_pages.write(tmp_path, {"index.md": f"# Home\n\n{text}\n"})
    settings = tmp_path / "zensical.toml"
    settings.write_text(settings.read_text().replace(f'paths = ["{ROOT}"]', f'paths = ["{tmp_path}"]'))
    assert (site_pages.build(tmp_path) == 0) is (not says)
    assert says in capfd.readouterr().out


@pytest.mark.slow
def test_doctests_are_fenced() -> None:
    """In a section and outside, up to the empty line."""
    assert importlib.util.find_spec("griffe"), "scripts/test installs the extra docs"
    from docstrings import markdown

    text = "It does.\n\n>>> f(1)\n2\n>>> for x in y:\n...     f(x)\n\nSource: One, 2020.\n"
    wanted = "It does.\n\n```pycon\n>>> f(1)\n2\n>>> for x in y:\n...     f(x)\n```\n\n**Source:** One, 2020.\n"
    assert markdown(text) == wanted
    assert (
        markdown("Args:\n    x: one.\n\n    >>> x\n    1\n")
        == "Args:\n    x: one.\n\n    ```pycon\n    >>> x\n    1\n    ```\n"
    )
