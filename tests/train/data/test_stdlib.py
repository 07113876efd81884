"""The text that every Python carries."""

import sys
import sysconfig

import pytest

from turnout.errors import DataError, UsageError
from turnout.train.data import prepare, python_text


def test_three_domains_without_tests_and_without_the_manual_twice() -> None:
    said = []
    found = python_text(say=said.append)
    assert len(found) + len(said) == 3
    names = [document.name for document in found["library"]]
    assert "textwrap.py" in names and "json/decoder.py" in names and names == sorted(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "site-packages", "idlelib", "pydoc_data", "__pycache__"}
    assert "topic lambda" in {document.name for document in found["manual"]}


@pytest.fixture
def python(tmp_path, monkeypatch):
    """An interpreter with a library of 30 files and headers of its own."""
    for folder, suffix in (("lib", "py"), ("include", "h")):
        (tmp_path / folder).mkdir()
        for n in range(30):
            (tmp_path / folder / f"{n:02d}.{suffix}").write_text(f"text {n} " * (n + 1))
    (tmp_path / "lib" / "empty.py").touch()
    (tmp_path / "lib" / "latin.py").write_bytes(b"# \xe9")
    paths = {"stdlib": str(tmp_path / "lib"), "include": str(tmp_path / "include")}
    monkeypatch.setattr(sysconfig, "get_path", paths.__getitem__)
    return tmp_path


def test_a_limit_takes_whole_documents_by_their_hash(python) -> None:
    whole = python_text(say=print)
    some = python_text(limit_bytes=1500, say=print)
    for name in ("library", "headers"):
        sizes = [document.content.stat().st_size for document in some[name]]
        assert 1200 < sum(sizes) <= 1500
        assert {d.name for d in some[name]} < {d.name for d in whole[name]} - {"latin.py", "empty.py"}
    sizes = [len(document.content.encode()) for document in some["manual"]]
    assert sum(sizes) <= 1500
    before = {d.name for d in some["library"]}
    taken = next(d.content for d in whole["library"] if d.name not in before | {"latin.py"})
    taken.unlink()  # another file going away changes nothing
    assert {d.name for d in python_text(limit_bytes=1500, say=print)["library"]} == before


def test_what_is_missing_is_said_and_left_out(python, monkeypatch, capsys) -> None:
    for path in (python / "include").iterdir():
        path.unlink()
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    assert list(python_text()) == ["library"]
    said = capsys.readouterr().err
    assert "carries no manual (no module pydoc_data.topics)" in said
    assert f"carries no headers (no .h files in {python / 'include'}" in said
    for path in (python / "lib").iterdir():
        path.unlink()
    with pytest.raises(DataError, match="carry its library, manual or headers"):
        python_text(say=print)
    with pytest.raises(UsageError, match="limit_bytes"):
        python_text(limit_bytes=0)


def test_it_can_be_prepared(python, tmp_path) -> None:
    domains = python_text(limit_bytes=20_000, say=print)
    tokens = prepare(domains, tmp_path / "out", vocab_size=300, held_out=0.2, quiet=True)
    assert tokens.domains == ("library", "manual", "headers")
    total = sum(tokens.byte_length_V[split.token_T].sum() for split in (tokens.train, tokens.held_out))
    assert total == sum(len(b"".join(d.pieces())) for documents in domains.values() for d in documents)


@pytest.mark.slow
def test_the_whole_of_it_is_ready_in_time(tmp_path) -> None:
    """The time is a property of the machine; what is checked is that all of the text arrives."""
    domains = python_text(say=print)
    tokens = prepare(domains, tmp_path / "out", vocab_size=4096, quiet=True)
    assert tokens.vocab_size == 4096 and not tokens.notes
    total = sum(int(tokens.byte_length_V[split.token_T].sum()) for split in (tokens.train, tokens.held_out))
    assert total == sum(len(piece) for documents in domains.values() for d in documents for piece in d.pieces())
    tokens.verify()
