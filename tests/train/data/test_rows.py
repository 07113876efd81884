"""Rows: jsonl, parquet and data sets; every broken one is named."""

import json
import sys
import types

import pytest

from turnout.errors import DataError, MissingExtraError, UnknownNameError, UsageError
from turnout.train.data.documents import read_documents


def texts(source, **options) -> list[str]:
    return [document.content for document in read_documents(source, **options)]


def test_jsonl(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": t, "body": t * 2}) + "\n" for t in ("one", "zwei\u2028", "三")))
    assert texts(path) == ["one", "zwei\u2028", "三"]
    assert texts(path, field="body") == ["oneone", "zwei\u2028zwei\u2028", "三三"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"text": "cut', r"rows\.jsonl:2 \(Invalid control.*repair or remove the row"),
        ('{"body": "x", "id": 3}', r"rows\.jsonl:2 \(no field 'text'; fields: body, id\).*pass field="),
        ('{"text": 3}', r"rows\.jsonl:2 \(its field 'text' holds the number 3"),
        ("[1]", r"rows\.jsonl:2 \(a JSON list\)"),
        ("\x00\x01", r"rows\.jsonl:2"),
        ("{}", r"fields: none"),
    ],
)
def test_a_broken_line_is_named(line, says, tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=says):
        texts(tmp_path / "rows.jsonl")


def test_a_line_that_is_not_utf8(tmp_path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1"):
        texts(tmp_path / "rows.jsonl")


def test_parquet(tmp_path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [f"row {n}" for n in range(600)]
    parquet.write_table(pyarrow.table({"text": [*rows, None], "id": list(range(601))}), tmp_path / "rows.parquet")
    assert texts(tmp_path / "rows.parquet") == [*rows, ""]
    found = [document.name for document in read_documents(tmp_path / "rows.parquet")]
    assert found[0].endswith("rows.parquet:1") and found[-1].endswith("rows.parquet:601")
    with pytest.raises(UnknownNameError, match=r"unknown field 'txt'.*Did you mean 'text'"):
        texts(tmp_path / "rows.parquet", field="txt")
    with pytest.raises(DataError, match=r"rows\.parquet:1 \(its field 'id' holds the number 0\)"):
        texts(tmp_path / "rows.parquet", field="id")
    whole = (tmp_path / "rows.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.parquet .*truncated, or no parquet"):
        texts(tmp_path / "cut.parquet")


@pytest.mark.parametrize(("source", "library"), [("hf:some/set", "datasets"), ("rows.parquet", "pyarrow")])
def test_a_missing_library_says_what_to_install(source, library, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.parquet").write_bytes(b"PAR1")
    extra = {"pyarrow": "parquet"}.get(library, library)
    with pytest.raises(MissingExtraError, match=rf"pip install 'turnout\[{extra}\]'"):
        texts(source)


class Rows:
    """As much of a datasets.Dataset as is used."""

    _fingerprint = "f00d"

    def __init__(self, columns) -> None:
        self.columns = columns

    @property
    def column_names(self):
        return list(self.columns)

    def select_columns(self, names):
        return Rows({name: self.columns[name] for name in names})

    def iter(self, batch_size):
        (texts,) = self.columns.values()
        for first in range(0, len(texts), batch_size):
            yield {name: column[first : first + batch_size] for name, column in self.columns.items()}


def test_a_data_set() -> None:
    rows = Rows({"text": [str(n) for n in range(300)], "label": [0] * 300})
    assert texts(rows) == [str(n) for n in range(300)]
    with pytest.raises(UnknownNameError, match="Available: label, text"):
        texts(rows, field="body")


def test_a_data_set_by_name(monkeypatch) -> None:
    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if arguments[0] == "no/such":
            raise FileNotFoundError("Couldn't find it")
        return Rows({"text": ["one"]})

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    assert texts("hf:own/er") == texts("hf:own/er:small:validation") == ["one"]
    assert calls == [(("own/er", None), {"split": "train"}), (("own/er", "small"), {"split": "validation"})]
    with pytest.raises(DataError, match=r"hf:no/such \(FileNotFoundError: Couldn't find it\)"):
        texts("hf:no/such")


def test_a_dictionary_of_splits_and_a_stream_are_not_one_split() -> None:
    class Splits(dict):
        column_names = None

    with pytest.raises(UsageError, match=r"DatasetDict with train, test.*pass \['train'\] of it"):
        texts(Splits(train=1, test=2))
    with pytest.raises(UsageError, match="without streaming=True"):
        texts(types.SimpleNamespace(column_names=["text"], iter=lambda batch_size: []))
