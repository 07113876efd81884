"""Rows that cannot be read: named with file and line, or skipped and counted, alike in all formats."""

import json
import struct

import pytest

from turnout.errors import DataError, UnknownNameError
from turnout.train.data import Document, TokenSet, prepare
from turnout.train.data.documents import read_documents


def texts() -> list[Document]:
    return [Document(str(n), f"text number {n}, and so on") for n in range(20)]


def make(domains, out, **options) -> TokenSet:
    return prepare(domains, out, **{"vocab_size": 260, "held_out": 0.3, "quiet": True, **options})


BAD = {
    "null": (None, None),
    "a number": (3, "holds the number 3"),
    "a list": (["x"], "holds a list"),
    "an object": ({"text": "x"}, "holds an object with text; fields inside fields are not looked for"),
    "half a surrogate pair": ("bad \ud83d half", "half a character"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_read_is_named_or_counted(name, tmp_path) -> None:
    value, why = BAD[name]
    rows = [{"text": f"row number {n} and so on"} for n in range(20)]
    rows.insert(7, {"text": value})
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if why is not None:
        with pytest.raises(DataError, match="leave such rows out with bad='skip'") as caught:
            make({"a": tmp_path / "d"}, tmp_path / "out")
        assert "a.jsonl:8" in str(caught.value) and why in str(caught.value)
    tokens = make({"a": tmp_path / "d"}, tmp_path / "out", bad="skip")
    kind = "empty or null texts" if why is None else "rows that cannot be read as text"
    assert any(n.startswith(f"left out 1 {kind}: ") and "a.jsonl:8" in n and (why or "") in n for n in tokens.notes)
    assert sum(split["documents"] for split in tokens.head["splits"].values()) == 20


@pytest.mark.parametrize("line", [b'{"text": "cut sho', b'{"text": "\xff"}', b'{"body": "x"}', b"[" * 100_000, b"\0"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_broken_line_stops_or_is_skipped(line, end, tmp_path) -> None:
    good = [json.dumps({"text": f"row number {n} and so on"}).encode() for n in range(20)]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + end.join([*good, line]))
    with pytest.raises(DataError, match=r"a\.jsonl:21 \("):
        make({"a": file}, tmp_path / "out")
    tokens = make({"a": file}, tmp_path / "out", bad="skip")
    assert sum(split["documents"] for split in tokens.head["splits"].values()) == 20
    assert any("left out 1 rows that cannot be read" in note and "a.jsonl:21" in note for note in tokens.notes)


def test_null_and_damaged_text_mean_the_same_in_every_format(tmp_path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n{"text": null}\n{"text": "\xff"}\n{"text": "y"}\n')
    offsets = pyarrow.py_buffer(struct.pack("<5i", 0, 1, 1, 2, 3))
    buffers = [pyarrow.py_buffer(bytes([0b1101])), offsets, pyarrow.py_buffer(b"x\xffy")]
    text = pyarrow.Array.from_buffers(pyarrow.utf8(), 4, buffers)
    parquet.write_table(pyarrow.table({"text": text}), tmp_path / "a.parquet")
    found = {}
    for name in ("a.jsonl", "a.parquet"):
        with pytest.raises(DataError, match=rf"{name}:3 \(byte \d+ of it is not UTF-8\)"):
            list(read_documents(tmp_path / name))
        told: list[str] = []
        read = [d.content for d in read_documents(tmp_path / name, left_out=lambda _, row, told=told: told.append(row))]
        found[name] = read, len(told)
    assert found["a.jsonl"] == found["a.parquet"] == (["x", "", "y"], 1)


def test_a_named_file_that_is_not_text_can_be_skipped_and_packed_ones_are_told(tmp_path) -> None:
    (tmp_path / "line.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    with pytest.raises(DataError, match=r"line\.txt \(byte 11 is not UTF-8, in line 3\)"):
        make({"a": [*texts(), tmp_path / "line.txt"]}, tmp_path / "out")
    (tmp_path / "more.txt.gz").write_bytes(b"\x1f\x8b\x08\xff")
    sources = [*texts(), tmp_path / "line.txt", tmp_path / "more.txt.gz"]
    notes = make({"a": sources}, tmp_path / "out", bad="skip").notes
    assert any("1 files that are not UTF-8" in note for note in notes) and any("1 packed files" in n for n in notes)


def test_only_refuse_and_skip(tmp_path) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean 'skip'"):
        make({"a": texts()}, tmp_path / "out", bad="skipp")
