"""Preparation: reproducible, reused when nothing changed, never half done, and clear about what it cannot use."""

import importlib
import json
import os
import random

import numpy as np
import pytest

from turnout.errors import DataError, StorageError, UsageError
from turnout.train.data import Document, TokenSet, prepare, reader
from turnout.train.data.shards import SideWriter

module = importlib.import_module("turnout.train.data.prepare")  # the package has the function under this name


def texts(count=40, seed=0, length=30) -> list[Document]:
    draw = random.Random(seed)
    words = ["cat", "dog", "élan", "sees", "the", "a", "()", "= 1\n", "猫"]
    return [Document(f"{seed}.{n}", " ".join(draw.choices(words, k=length)) + f" {seed} {n}") for n in range(count)]


def make(domains, out, **options) -> TokenSet:
    return prepare(domains, out, **{"vocab_size": 270, "held_out": 0.3, "quiet": True, **options})


def documents(tokens: TokenSet, side: str) -> list[str]:
    split = getattr(tokens, side)
    bounds = zip(split.document_N[:-1], split.document_N[1:], strict=True)
    return [tokens.tokenizer.decode(split.token_T[start + 1 : stop].tolist()) for start, stop in bounds]


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "data").mkdir()
    for n, text in enumerate(texts()):
        (tmp_path / "data" / f"{n:02d}.txt").write_text(text.content)
    return tmp_path / "data"


# ---- what comes out


def test_the_digest_depends_on_the_text_and_nothing_else(folder, tmp_path) -> None:
    first = make({"a": folder}, tmp_path / "first")
    moved = folder.rename(tmp_path / "elsewhere")
    for path in moved.iterdir():
        os.utime(path, (1, 1))
    assert make({"a": moved}, tmp_path / "second").digest == first.digest
    assert make({"b": moved}, tmp_path / "third").digest != first.digest
    (moved / "00.txt").write_text("something else, and quite different")
    assert make({"a": moved}, tmp_path / "fourth").digest != first.digest


def test_copies_of_a_text_are_on_the_same_side(tmp_path) -> None:
    found = texts()
    tokens = make({"a": found, "b": [Document("copy", d.content) for d in reversed(found)]}, tmp_path / "out")
    train, held = documents(tokens, "train"), documents(tokens, "held_out")
    assert not set(train) & set(held)
    assert all(train.count(text) == 2 for text in train) and all(held.count(text) == 2 for text in held)
    assert 4 <= len(set(held)) <= 20  # 12 of 40 expected


def test_a_text_keeps_its_side_when_others_come(tmp_path) -> None:
    few = make({"a": texts(40)}, tmp_path / "few")
    more = make({"a": texts(40) + texts(40, seed=1)}, tmp_path / "more")
    assert set(documents(few, "held_out")) <= set(documents(more, "held_out"))


def test_all_or_nothing_held_out_when_asked(tmp_path) -> None:
    tokens = make({"a": texts()}, tmp_path / "all", held_out=1.0)
    assert tokens.train.num_documents == 0 and tokens.held_out.num_documents == 40 and tokens.train.num_tokens == 0
    tokens = make({"a": texts()}, tmp_path / "none", held_out=0)
    assert tokens.train.num_documents == 40 and tokens.held_out.num_documents == 0


def test_the_tokenizer_learns_from_trained_documents_only(tmp_path) -> None:
    found = texts(60)
    tokens = make({"a": found}, tmp_path / "out")
    held = set(documents(tokens, "held_out"))
    changed = [Document(d.name, d.content + (" zzzz zzzz zzzz" if d.content in held else "")) for d in found]
    # Only those that are still held out: a new text is a new hash.
    still = [d for d in changed if not d.content.endswith("zzzz") or _is_held(d.content)]
    again = make({"a": still}, tmp_path / "again")
    assert any("zzzz" in text for text in documents(again, "held_out"))
    assert again.tokenizer.to_str() == tokens.tokenizer.to_str()


def _is_held(text: str, share=0.3) -> bool:
    import hashlib

    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def test_a_document_larger_than_a_piece_and_one_of_a_single_token(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(reader, "_HELD_BYTES", 100_000)
    draw = random.Random(3)
    long = "".join(draw.choices(["cat ", "dog  ", "été\n", "\t42 ", "猫"], k=80_000))
    (tmp_path / "long.txt").write_text(long)
    tokens = make({"a": [*texts(), tmp_path / "long.txt", Document("tiny", "x")]}, tmp_path / "out")
    found = documents(tokens, "train") + documents(tokens, "held_out")
    assert long in found and "x" in found and len(long.encode()) > 2 * 100_000
    whole = tokens.tokenizer.encode(long, add_special_tokens=False).ids
    side = tokens.held_out if _is_held(long) else tokens.train
    n = int(np.diff(side.document_N).argmax())
    assert side.token_T[side.document_N[n] + 1 : side.document_N[n + 1]].tolist() == whole


def test_memory_stays_flat_for_a_large_file(tmp_path) -> None:
    """No piece that goes to the tokenizer or the disk is larger than a few megabytes, whatever the file."""
    (tmp_path / "large.txt").write_text("all work and no play makes jack a dull boy\n" * 60_000)
    most = 0
    real = module.encode

    def watched(tokenizer, pieces):
        nonlocal most
        most = max(most, sum(map(len, pieces)))
        return real(tokenizer, pieces)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "encode", watched)
        patch.setattr(module, "_BATCH_BYTES", 1 << 20)
        tokens = make({"a": tmp_path / "large.txt"}, tmp_path / "out", part_bytes=25_000, sample_bytes=50_000)
    assert 1 << 20 <= most < 1 << 21
    total = sum(tokens.byte_length_V[split.token_T].sum() for split in (tokens.train, tokens.held_out))
    assert total == (tmp_path / "large.txt").stat().st_size
    sizes = np.diff(tokens.train.document_N)
    assert tokens.train.num_documents + tokens.held_out.num_documents in range(90, 120) and sizes.min() > 1


def test_an_existing_tokenizer(tmp_path) -> None:
    first = make({"a": texts()}, tmp_path / "first")
    second = make({"a": texts(seed=1)}, tmp_path / "second", tokenizer=tmp_path / "first", vocab_size=None)
    assert second.tokenizer.to_str() == first.tokenizer.to_str()
    with pytest.raises(UsageError, match="pass vocab_size=270"):
        make({"a": texts(seed=1)}, tmp_path / "third", tokenizer=tmp_path / "first", vocab_size=260)


@pytest.mark.parametrize("limit", [500, 2000, 10**9])
def test_a_limit_takes_that_much_of_each_domain(limit, tmp_path) -> None:
    domains = {"a": texts(60), "b": texts(30, seed=1, length=80), "c": [Document("c", "é" * 4000)]}
    tokens = make(domains, tmp_path / "out", limit_bytes=limit, vocab_size=258, held_out=0.5)
    sums = np.zeros(3, int)
    for split in (tokens.train, tokens.held_out):
        for n, domain in enumerate(split.domain_N):
            sums[domain] += tokens.byte_length_V[split.token_T[split.document_N[n] : split.document_N[n + 1]]].sum()
    have = [sum(len(d.content.encode()) for d in source) for source in domains.values()]
    wanted = [min(limit, size) for size in have]
    assert all(want - 2 <= got <= want for got, want in zip(sums, wanted, strict=True)), (sums, wanted)
    assert tokens.train.num_documents and tokens.held_out.num_documents  # the limit does not lean on the side


# ---- using it again


def test_nothing_is_read_again_until_something_changes(folder, tmp_path, monkeypatch) -> None:
    first = make({"a": folder}, tmp_path / "out")
    built = []
    real = module._build
    monkeypatch.setattr(module, "_build", lambda *arguments: built.append(1) or real(*arguments))
    assert make({"a": folder}, tmp_path / "out").digest == first.digest and not built
    os.utime(folder / "00.txt", ns=(1, 1))
    assert make({"a": folder}, tmp_path / "out").digest == first.digest and len(built) == 1
    changes = ({"held_out": 0.4}, {"vocab_size": 271}, {"limit_bytes": 900}, {"part_bytes": 300}, {"sample_bytes": 50})
    for count, change in enumerate(changes, 2):
        options = {"vocab_size": 260, **change}
        make({"a": folder}, tmp_path / "out", **options)
        assert len(built) == count, change
        make({"a": folder}, tmp_path / "out", **options)
        assert len(built) == count, change
    (folder / "new.txt").write_text("a new file")
    make({"a": folder}, tmp_path / "out", **options)
    assert len(built) == len(changes) + 2


def test_a_changed_text_in_memory_is_noticed(tmp_path) -> None:
    first = make({"a": texts()}, tmp_path / "out")
    assert make({"a": texts()}, tmp_path / "out").digest == first.digest
    assert make({"a": [*texts(), Document("new", "new")]}, tmp_path / "out").digest != first.digest


@pytest.mark.parametrize("after", [0, 1, 3])
def test_an_interrupted_preparation_is_never_a_token_set(after, tmp_path, monkeypatch) -> None:
    """Also when a whole one was there before; the next attempt finishes."""
    make({"a": texts()}, tmp_path / "out")
    calls = 0

    def stop(self, *arguments):
        nonlocal calls
        calls += 1
        if calls > after:
            raise KeyboardInterrupt
        return real(self, *arguments)

    real = SideWriter.begin
    with monkeypatch.context() as patch:
        patch.setattr(SideWriter, "begin", stop)
        with pytest.raises(KeyboardInterrupt):
            make({"a": texts(seed=1)}, tmp_path / "out")
    assert not (tmp_path / "out" / "tokens.json").exists()
    assert make({"a": texts(seed=1)}, tmp_path / "out").digest == make({"a": texts(seed=1)}, tmp_path / "new").digest


def test_a_damaged_folder_is_prepared_again_and_said_so(folder, tmp_path) -> None:
    first = make({"a": folder}, tmp_path / "out")
    (tmp_path / "out" / "train" / "token.bin").write_bytes(b"")
    said = Told()
    assert make({"a": folder}, tmp_path / "out", progress=said).digest == first.digest
    assert any("token.bin (0 bytes long" in line for line in said.lines)


def test_who_has_mapped_the_old_tokens_keeps_them(folder, tmp_path) -> None:
    old = make({"a": folder}, tmp_path / "out")
    before = old.train.token_T.tolist()
    make({"a": texts(200, seed=1)}, tmp_path / "out")
    assert old.train.token_T.tolist() == before


# ---- what is told


class Told:
    def __init__(self) -> None:
        self.lines, self.calls = [], []

    def __call__(self, stage, done, total) -> None:
        self.calls.append((stage, done, total))

    def say(self, text) -> None:
        self.lines.append(text)


def test_progress_of_each_stage(tmp_path) -> None:
    told = Told()
    make({"a": texts()}, tmp_path / "out", progress=told)
    stages = list(dict.fromkeys(stage for stage, _, _ in told.calls))
    assert stages == ["reading", "sampling", "training the tokenizer", "tokenising"]
    done = [done for stage, done, _ in told.calls if stage == "tokenising"]
    total = sum(len(text.content.encode()) for text in texts())
    assert done == sorted(done) and done[-1] == total == told.calls[-1][2]
    assert "prepared" in told.lines[-1]


def test_quiet_is_quiet_and_plain_lines_go_to_stderr(tmp_path, capfd) -> None:
    make({"a": texts()}, tmp_path / "one")
    assert capfd.readouterr() == ("", "")
    make({"a": texts()}, tmp_path / "two", quiet=False)
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("prepared TokenSet(") and err.count("\n") == 1


def test_what_is_skipped_in_a_folder_is_said(folder, tmp_path) -> None:
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "__init__.py").touch()
    (folder / "latin.txt").write_bytes("déjà vu".encode("latin-1"))
    told = Told()
    tokens = make({"a": folder}, tmp_path / "out", progress=told)
    assert tokens.notes == tuple(tokens.head["notes"]) and all(note in told.lines for note in tokens.notes)
    assert any(n.startswith("left out 1 empty or null texts: ") and "__init__.py" in n for n in tokens.notes)
    assert any(n.startswith("left out 2 files that are not UTF-8") and "picture.png" in n for n in tokens.notes)
    assert len(documents(tokens, "train")) + len(documents(tokens, "held_out")) == 40


def test_the_held_out_text_is_known_whatever_the_tokenizer_and_the_order(folder, tmp_path) -> None:
    def held(name: str, **options) -> str:
        sources = options.pop("sources", [folder])
        return make({"a": sources}, tmp_path / name, **options).head["held_out_text"]

    one = held("one")
    assert one == held("two", vocab_size=261) == held("three", sources=sorted(folder.iterdir(), reverse=True))
    assert len({one, held("four", held_out=0.5), held("five", limit_bytes=2000)}) == 3
    (folder / "00.txt").write_text("other")
    assert held("six", held_out=1.0) != held("seven", held_out=1.0, sources=sorted(folder.iterdir())[1:])


# ---- what cannot be


def test_a_named_file_that_is_not_text(tmp_path) -> None:
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(DataError, match=r"picture\.png \(byte 0 is not UTF-8\)"):
        make({"a": [*texts(), tmp_path / "picture.png"]}, tmp_path / "out")


def test_a_folder_of_nothing_but_pictures(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "picture.png").write_bytes(b"\x89PNG\0")
    with pytest.raises(DataError, match=r"the domain 'a' must hold text.*left out 1 files .*picture\.png"):
        make({"a": tmp_path / "data"}, tmp_path / "out")
    with pytest.raises(DataError, match=r"the domain 'a'.*1 empty or null texts"):
        make({"a": Document("nothing", ""), "b": texts()}, tmp_path / "out")
    with pytest.raises(DataError, match="the domain 'a'"):
        make({"a": []}, tmp_path / "out")


def test_an_empty_side_names_the_share_that_works(tmp_path) -> None:
    few = texts(5)
    with pytest.raises(DataError, match=r"0\.0001, with which all 5 documents are trained on") as caught:
        make({"a": few}, tmp_path / "out", held_out=0.0001, vocab_size=258)
    share = float(str(caught.value).rpartition("held_out=")[2].partition(",")[0])
    assert make({"a": few}, tmp_path / "out", held_out=share, vocab_size=258).held_out.num_documents == 1
    with pytest.raises(DataError, match=r"0\.9999, with which all 5 documents are held out") as caught:
        make({"a": few}, tmp_path / "out", held_out=0.9999, vocab_size=258)
    share = float(str(caught.value).rpartition("held_out=")[2].partition(",")[0])
    assert make({"a": few}, tmp_path / "out", held_out=share, vocab_size=258).train.num_documents == 1


def test_a_single_long_file_can_be_cut_into_parts(tmp_path) -> None:
    (tmp_path / "book.txt").write_text("\n".join(text.content for text in texts(300)))
    with pytest.raises(DataError, match=r"0\.3 of 1 document.*part_bytes=16384"):
        make({"book": tmp_path / "book.txt"}, tmp_path / "out")
    tokens = make({"book": tmp_path / "book.txt"}, tmp_path / "out", part_bytes=1024)
    assert tokens.train.num_documents > 10 < 2 * tokens.held_out.num_documents
    sizes = [len(text.encode()) for text in documents(tokens, "train")]
    assert 900 < np.mean(sizes) < 1150


def test_a_domain_with_nothing_held_out_is_said(tmp_path) -> None:
    tokens = make({"a": texts(), "b": Document("b", "a single one, trained on")}, tmp_path / "out")
    assert any("no document of the domain 'b' is" in note and "only 1" in note for note in tokens.notes)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"held_out": 1.5}, r"held_out must be a share in \[0, 1\]"),
        ({"held_out": -0.1}, "held_out"),
        ({"limit_bytes": 0}, "limit_bytes must be 1 or more"),
        ({"part_bytes": 10}, "part_bytes must be 256 or more"),
        ({"sample_bytes": 0}, "sample_bytes"),
        ({"vocab_size": 100}, "vocab_size must be at least 257"),
    ],
)
def test_settings_out_of_range(options, says, tmp_path) -> None:
    with pytest.raises(UsageError, match=says):
        make({"a": texts()}, tmp_path / "out", **options)


def test_a_vocabulary_larger_than_the_data_supports(tmp_path) -> None:
    with pytest.raises(DataError, match="vocab_size must be at most"):
        make({"a": texts()}, tmp_path / "out", vocab_size=50_000)
    assert not (tmp_path / "out" / "tokens.json").exists()


@pytest.mark.parametrize("domains", [{}, "folder", ["folder"], {"": "x"}, {3: "x"}])
def test_domains_that_are_none(domains, tmp_path) -> None:
    with pytest.raises(UsageError, match="domains must map"):
        make(domains, tmp_path / "out")


def test_folders_that_are_not_ours(folder, tmp_path) -> None:
    with pytest.raises(UsageError, match=r"inside the source .*data-tokens"):
        make({"a": folder}, folder / "tokens")
    with pytest.raises(UsageError, match=r"holds 00\.txt, 01\.txt"):
        make({"a": texts()}, folder)
    (tmp_path / "mine" / "train").mkdir(parents=True)
    (tmp_path / "mine" / "train" / "book.txt").write_text("my only copy")
    with pytest.raises(UsageError, match=r"holds train/book\.txt"):
        make({"a": texts()}, tmp_path / "mine")
    assert (tmp_path / "mine" / "train" / "book.txt").read_text() == "my only copy"
    with pytest.raises(UsageError, match="a file"):
        make({"a": texts()}, folder / ".." / "data" / ".." / "mine" / "train" / "book.txt")


def test_a_folder_without_permission_and_a_full_disk(folder, tmp_path, monkeypatch) -> None:
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse)
        with pytest.raises(StorageError, match=r"accessible to this user.*data \(Permission denied\)"):
            make({"a": folder}, tmp_path / "out")

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    real = SideWriter.__init__

    def on_a_full_disk(self, *arguments):
        real(self, *arguments)
        self._columns["token"].file.close()
        self._columns["token"].file = Full()

    with monkeypatch.context() as patch:
        patch.setattr(SideWriter, "__init__", on_a_full_disk)
        with pytest.raises(StorageError, match=r"be on a disk with room.*token\.bin"):
            make({"a": folder}, tmp_path / "out")
    assert not (tmp_path / "out" / "tokens.json").exists()
    make({"a": folder}, tmp_path / "out").verify()


def test_sources_that_change_while_they_are_read(folder, tmp_path, monkeypatch) -> None:
    real = module._train

    def meddle(*arguments):
        (folder / "05.txt").write_text("grown in between")
        return real(*arguments)

    monkeypatch.setattr(module, "_train", meddle)
    with pytest.raises(DataError, match="stay as they are"):
        make({"a": folder}, tmp_path / "out")
    assert not (tmp_path / "out" / "tokens.json").exists()


def test_rows_in_a_folder(tmp_path) -> None:
    (tmp_path / "data").mkdir()
    rows = [json.dumps({"body": text.content}) for text in texts()]
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(rows))
    tokens = make({"a": tmp_path / "data"}, tmp_path / "out", field="body")
    assert sorted(documents(tokens, "train") + documents(tokens, "held_out")) == sorted(t.content for t in texts())


def test_tokens_that_were_altered_are_prepared_again_and_that_is_said(folder, tmp_path) -> None:
    """What a run or its resume trains on is what was prepared, or is made again; never other bytes in silence."""
    before = make({"a": folder}, tmp_path / "out")
    file = tmp_path / "out" / "train" / "token.bin"
    whole, data, times = file.read_bytes(), bytearray(file.read_bytes()), file.stat()
    data[-2] ^= 3
    file.write_bytes(data)
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    told: list[str] = []

    class Tell:
        def __call__(self, stage, done, total):
            pass

        def say(self, text):
            told.append(text)

    after = make({"a": folder}, tmp_path / "out", quiet=False, progress=Tell())
    assert file.read_bytes() == whole and after.digest == before.digest
    assert any("again" in text and "token.bin (SHA-256" in text for text in told), told
