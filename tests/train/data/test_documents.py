"""Sources: folders in order, single files, lists; and what is none of them."""

import os
from pathlib import Path

import pytest

from turnout.errors import DataError, StorageError, UsageError
from turnout.train.data.documents import Document, list_files, read_documents


def names(source, **options) -> list[str]:
    return [Path(document.name).name for document in read_documents(source, **options)]


@pytest.fixture
def folder(tmp_path) -> Path:
    for name in ("b/z.py", "b/a.md", "a.txt", "c.h", ".git/config", "b/__pycache__/x.txt", ".hidden"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    (tmp_path / "rows.jsonl").write_text('{"text": "one"}\n\n{"text": "two"}\n')
    return tmp_path


def test_a_folder_is_read_in_the_order_of_its_paths(folder) -> None:
    assert names(folder) == ["a.txt", "a.md", "z.py", "c.h", "rows.jsonl:1", "rows.jsonl:3"]
    assert names(str(folder)) == names(folder)


def test_the_order_does_not_depend_on_the_system(folder, monkeypatch) -> None:
    before = names(folder)
    real = os.scandir

    class Backwards(list):
        def __enter__(self):
            return self

        def __exit__(self, *rest):
            return None

    monkeypatch.setattr(os, "scandir", lambda path: Backwards(reversed(list(real(path)))))
    assert names(folder) == before


def test_a_link_to_a_folder_is_passed_over_and_one_to_a_file_is_read(folder) -> None:
    (folder / "loop").symlink_to(folder)
    (folder / "link.txt").symlink_to(folder / "a.txt")
    assert names(folder).count("a.txt") == 1 and "link.txt" in names(folder)


def test_a_named_file_must_be_text_and_a_found_one_may_be_skipped(folder) -> None:
    assert [optional for _, optional in list_files(folder)] == [True] * 5
    assert list_files(folder / "a.txt") == [(folder / "a.txt", False)]


def test_lists_of_anything(folder) -> None:
    assert names([folder / "a.txt", [str(folder / "c.h"), Document("note", "text")]]) == ["a.txt", "c.h", "note"]


def test_a_missing_path_names_its_nearest_sibling(folder) -> None:
    with pytest.raises(UsageError, match=r"Nearest fix: pass .*/a\.txt, which is there"):
        names(folder / "a.text")
    with pytest.raises(UsageError, match=r"Nearest fix: pass .*/b, which is there"):
        names(folder / "bb" / "deep" / "x.txt")
    with pytest.raises(UsageError, match="check the spelling"):
        names(folder / "quite different")


def test_empty_files_and_folders(tmp_path) -> None:
    (tmp_path / "empty.txt").touch()
    with pytest.raises(DataError, match=r"empty\.txt \(an empty file\)"):
        names(tmp_path / "empty.txt")
    (tmp_path / "nothing").mkdir()
    with pytest.raises(DataError, match="a folder without files"):
        names(tmp_path / "nothing")


def test_a_folder_without_permission(folder, monkeypatch) -> None:
    real = os.scandir

    def refuse(path):
        if Path(path).name == "b":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(StorageError, match=r"accessible to this user.*/b \(Permission denied\)"):
        names(folder)


@pytest.mark.parametrize("source", [3, None, b"bytes", (part for part in "ab"), {"a": 1}])
def test_what_is_no_source(source) -> None:
    with pytest.raises(UsageError, match="a source must be a path"):
        names(source)


def test_a_list_of_rows_in_one_json_file_is_not_taken_for_text(tmp_path) -> None:
    file = tmp_path / "data.json"
    for start in ("", "\ufeff", "\n  "):
        file.write_text(start + '[\n  {"id": 1, "text": "one"},\n  {"id": 2, "text": "two"}\n]', encoding="utf-8")
        with pytest.raises(DataError, match=r"one JSON list of rows.*\.jsonl file"):
            list(read_documents(file))
    assert names(file, field="body") == ["data.json"]  # no rows of this field
    assert names(tmp_path) == ["data.json"]  # in a folder of all kinds of files it is text as others are
    file.write_text('{"text": "one"}')
    assert names(file) == ["data.json"]
