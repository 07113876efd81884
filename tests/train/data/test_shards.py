"""Token sets on disk: whole or an error that names the file."""

import json
import re
import shutil

import numpy as np
import pytest
import torch

from turnout.errors import CheckpointError
from turnout.storage import digest, sealed
from turnout.train.data import Document, TokenSet, prepare
from turnout.train.data.shards import SideWriter, token_dtype

TEXTS = [Document(str(n), f"text number {n}, and so on, été {n}") for n in range(40)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "tokens"
    prepare({"one": TEXTS[:30], "two": TEXTS[30:]}, out, vocab_size=270, held_out=0.3, quiet=True)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "tokens")


def test_columns_and_dtypes(whole) -> None:
    tokens = TokenSet.open(whole)
    assert tokens.domains == ("one", "two") and tokens.vocab_size == 270 and tokens.separator_id == 0
    total = 0
    for split in (tokens.train, tokens.held_out):
        assert isinstance(split.token_T, np.memmap) and not split.token_T.flags.writeable
        assert [c.dtype.str for c in (split.token_T, split.document_N, split.domain_N)] == ["<u2", "<i8", "<u2"]
        assert split.document_N[0] == 0 and split.document_N[-1] == split.num_tokens
        assert (np.diff(split.document_N) > 1).all()
        assert (split.token_T[split.document_N[:-1]] == 0).all() and (split.token_T == 0).sum() == split.num_documents
        total += tokens.byte_length_V[split.token_T].sum()
    assert total == sum(len(text.content.encode()) for text in TEXTS)
    tokens.verify()


def test_the_documents_come_back(whole) -> None:
    tokens = TokenSet.open(whole)
    found = {}
    for split in (tokens.train, tokens.held_out):
        for n in range(split.num_documents):
            ids = split.token_T[split.document_N[n] + 1 : split.document_N[n + 1]].tolist()
            found[tokens.tokenizer.decode(ids)] = tokens.domains[split.domain_N[n]]
    assert found == {text.content: "one" if n < 30 else "two" for n, text in enumerate(TEXTS)}


def test_a_wide_vocabulary_takes_four_bytes(tmp_path) -> None:
    assert [token_dtype(n) for n in (257, 65536, 65537)] == ["<u2", "<u2", "<u4"]
    writer = SideWriter(tmp_path, "train", 70_000)
    writer.begin(0, 0)
    writer.add([69_999])
    assert writer.finish()["train/token.bin"]["bytes"] == 8
    assert np.fromfile(tmp_path / "train" / "token.bin", "<u4").tolist() == [0, 69_999]


@pytest.mark.parametrize(
    "name", ["train/token.bin", "train/document.bin", "held_out/domain.bin", "held_out/token.bin", "tokenizer.json"]
)
def test_a_damaged_file_is_named(name, copy) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(CheckpointError, match=re.escape(f"{name} ({len(data) - 1} bytes long, not {len(data)})")):
        TokenSet.open(copy)
    (copy / name).unlink()
    with pytest.raises(CheckpointError, match=re.escape(f"{name} (missing)")):
        TokenSet.open(copy)
    (copy / name).write_bytes(bytes([data[0] ^ 4]) + data[1:])
    with pytest.raises(CheckpointError, match=rf"{re.escape(name)} \(SHA-256"):
        TokenSet.open(copy).verify()


def test_a_damaged_head_is_named(copy, tmp_path) -> None:
    head = json.loads((copy / "tokens.json").read_text())
    for body, says in (
        ('{"format"', "tokens.json"),
        ("[]", "a JSON list"),
        (json.dumps(head | {"format": "turnout.tokens/9"}), "not of the format turnout.tokens/1"),
        (json.dumps({k: v for k, v in head.items() if k != "files"}), "lacks 'files'"),
        (json.dumps({k: v for k, v in head.items() if k != "domains"}), "lacks 'domains'"),
    ):
        (copy / "tokens.json").write_text(body)
        with pytest.raises(CheckpointError, match=says):
            TokenSet.open(copy)
    (copy / "tokens.json").unlink()
    with pytest.raises(CheckpointError, match="never finished"):
        TokenSet.open(copy)
    with pytest.raises(CheckpointError, match="never finished"):
        TokenSet.open(tmp_path / "nowhere")


def test_columns_that_do_not_fit_each_other(copy) -> None:
    head = json.loads((copy / "tokens.json").read_text())
    name = "train/domain.bin"
    (copy / name).write_bytes((copy / name).read_bytes() + b"\0\0")
    head["files"][name] = {"bytes": head["files"][name]["bytes"] + 2, "sha256": digest(copy / name)}
    del head["sha256"]
    (copy / "tokens.json").write_text(json.dumps(sealed(head)))
    with pytest.raises(CheckpointError, match="offsets"):
        TokenSet.open(copy)


def test_its_columns_go_into_torch(whole) -> None:
    split = TokenSet.open(whole).held_out
    sizes = torch.from_numpy(split.document_N[1:] - split.document_N[:-1])
    assert int(sizes.sum()) == split.num_tokens
