"""Tests of turnout.reading: what JSON may be, where files may lie, and that nothing blocks."""

import os
from typing import Any, Literal

import pytest

from turnout.errors import CheckpointError, DataError, TurnoutError
from turnout.reading import check_fields, check_link, open_regular, parse_json, plain_name, read_json, read_lines

SURROGATE = "\\" + "ud800"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[1]", "a JSON list"),
        ("null", "a JSON NoneType"),
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' twice"),
        ('{"a": NaN}', "NaN, which is not a finite number"),
        ('{"a": -Infinity}', "-Infinity, which is not a finite number"),
        ('{"a": 1e999}', "1e999, which is not a finite number"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", "nested deeper than 64 levels"),
        ('{"a":' * 100_000, "nested deeper than 64 levels"),
        ("[" * 100_000, "nested deeper than 64 levels"),
        (f'{{"{SURROGATE}": 1}}', "half a character"),
        (b'{"a": "\xff"}', "not UTF-8|invalid start byte"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_what_is_not_plain_json_is_refused_by_what_is_wrong(text, says, tmp_path) -> None:
    with pytest.raises(DataError, match=says):
        parse_json(text, DataError)
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=rf"a\.json .*({says})"):
        read_json(path)


def test_what_python_writes_is_read_where_asked() -> None:
    assert parse_json('{"a": Infinity, "b": "\\ud83d\\ude00"}', DataError, finite=False) == {
        "a": float("inf"),
        "b": "😀",
    }
    assert parse_json("[" * 64 + "]" * 64, DataError, top=list)[0]


def test_a_long_file_is_refused_before_it_is_read_whole(tmp_path) -> None:
    (tmp_path / "a.json").write_text(" " * 100 + "{}")
    assert read_json(tmp_path / "a.json", limit=102) == {}
    with pytest.raises(CheckpointError, match="longer than 101 bytes"):
        read_json(tmp_path / "a.json", limit=101)
    with pytest.raises(CheckpointError, match="line 1 is longer than 10 bytes"):
        list(read_lines(tmp_path / "a.json", limit=10))


def test_nothing_blocks_and_nothing_endless_is_read(tmp_path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="a pipe, not a file"):
        read_json(tmp_path / "pipe")
    for device in ("/dev/zero", "/dev/null"):
        (tmp_path / "config.json").unlink(missing_ok=True)
        (tmp_path / "config.json").symlink_to(device)
        with pytest.raises(CheckpointError, match="outside its folder"):
            read_json(tmp_path / "config.json")
        with pytest.raises(CheckpointError, match="a device, not a file"):
            read_json(tmp_path / "config.json", any_link=True)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nothing.json")


def test_links_stay_in_their_folder_or_in_the_hubs_cache(tmp_path) -> None:
    home, other = tmp_path / "model", tmp_path / "other.json"
    home.mkdir()
    other.write_text("{}")
    (home / "real.json").write_text("{}")
    for name, target, allowed in [
        ("near", "real.json", True),
        ("absolute", home / "real.json", True),
        ("up", "../other.json", False),
        ("out", other, False),
        ("through", "up", False),
        ("nothing", "../nothing.json", False),
    ]:
        (home / name).symlink_to(target)
        if allowed:
            assert read_json(home / name) == {}
        else:
            with pytest.raises(CheckpointError, match="outside its folder"):
                read_json(home / name)


def test_the_hubs_cache_is_read_through_its_links(tmp_path) -> None:
    repository = tmp_path / "hub" / "models--owner--name"
    snapshot = repository / "snapshots" / "0123abcd"
    (repository / "blobs").mkdir(parents=True)
    (snapshot / "sub").mkdir(parents=True)
    (repository / "blobs" / "hash").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/hash")
    (snapshot / "sub" / "config.json").symlink_to("../../../blobs/hash")
    (tmp_path / "hub" / "models--owner--other").mkdir()
    (tmp_path / "hub" / "models--owner--other" / "secret.json").write_text("{}")
    (snapshot / "far.json").symlink_to("../../../models--owner--other/secret.json")
    assert read_json(snapshot / "config.json") == read_json(snapshot / "sub" / "config.json") == {}
    with pytest.raises(CheckpointError, match="outside its folder"):
        check_link(snapshot / "far.json")


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../x", "a/b", "/etc/x", "a\\b", "c:x", "a\0b", "a\nb", "é" * 128, None, 3, ["a"]]
)
def test_names_of_files_are_plain(name) -> None:
    with pytest.raises(DataError, match="plain name of a file"):
        plain_name(name, DataError)


def test_plain_names_pass() -> None:
    for name in ("model.safetensors", "..a", "é.json", "model-00001-of-00002.safetensors"):
        assert plain_name(name, DataError) == name


@pytest.mark.parametrize(
    ("value", "kind", "fits"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (2**63, int, False),
        (1, float, True),
        (float("nan"), float, False),
        (10**400, float, False),
        ("a", str, True),
        (None, str, False),
        (None, str | None, True),
        ([1, 2], list[int], True),
        ([1, "2"], list[int], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": None}, dict[str, int], False),
        ({"a": [{}]}, dict[str, list[dict]], True),
        ("a", Literal["a", "b"], True),
        (1, Literal[True], False),
        ({}, Any, True),
    ],
)
def test_fields_have_their_types(value, kind, fits) -> None:
    if fits:
        check_fields({"name": value}, {"name": kind}, DataError)
    else:
        with pytest.raises(TurnoutError, match="'name' is "):
            check_fields({"name": value}, {"name": kind}, DataError)


def test_a_missing_field_is_named() -> None:
    check_fields({}, {"name": int | None}, DataError)
    with pytest.raises(DataError, match="it lacks 'name'"):
        check_fields({}, {"name": int}, DataError)
