"""Documents in pieces: whole, valid, and cut where words begin."""

import random

import pytest

from turnout.errors import StorageError
from turnout.train.data.document import Document, NotTextError
from turnout.train.data.tokenizer import encode, train_tokenizer

TEXTS = {
    "words": "the quick brown fox,  jumps over\n\tthe lazy   dog. " * 4000,
    "no spaces": "x" * 200_000,
    "only spaces": " " * 150_000,
    "wide": "例えば長い文章です。\n" * 9000,
    "four bytes": "🙂" * 40_000,
    "short": "a",
}


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("place", ["memory", "file"])
def test_pieces_add_up_and_each_is_valid(name, place, tmp_path) -> None:
    data = TEXTS[name].encode()
    if place == "file":
        (tmp_path / "text").write_bytes(data)
    content = data if place == "memory" else tmp_path / "text"
    pieces = list(Document(name, content).pieces())
    assert b"".join(pieces) == data
    assert all(0 < len(piece) <= 65536 and piece.decode() for piece in pieces)


@pytest.mark.parametrize("seed", range(5))
def test_the_tokens_of_the_pieces_are_those_of_the_whole(seed) -> None:
    draw = random.Random(seed)
    words = ["the", "don't", "x+=1", "été", "例", "42", "<|endoftext|>", "🙂", "\u3000", "\u00a0"]
    gaps = [" ", " ", " ", "  ", "\n", "\n    ", "\t", " \n ", "\r\n"]
    text = "".join(draw.choice(words) + draw.choice(gaps) for _ in range(3000))
    tokenizer = train_tokenizer([text], vocab_size=300)
    pieces = [piece.decode() for piece in Document("text", text).pieces(512)]
    assert len(pieces) > 20
    assert [i for ids in encode(tokenizer, pieces) for i in ids] == encode(tokenizer, [text])[0]


def test_small_pieces_of_wide_characters() -> None:
    text = "🙂é例" * 50
    for size in range(4, 20):
        pieces = list(Document("text", text).pieces(size))
        assert b"".join(pieces).decode() == text
        assert all(len(piece) <= size for piece in pieces)


def test_a_byte_order_mark_is_left_out(tmp_path) -> None:
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert list(Document("bom", tmp_path / "bom.txt").pieces()) == [b"hello"]
    (tmp_path / "tiny.txt").write_bytes(b"a")
    assert list(Document("tiny", tmp_path / "tiny.txt").pieces()) == [b"a"]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"abc\0def", "a NUL byte at 3"),
        (b"a" * 70_000 + b"\xff", "byte 70000 is not UTF-8"),
        ("été".encode("utf-16"), "byte 0 is not UTF-8"),
        (b"cut \xe4\xbe", "byte 4 is not UTF-8"),
    ],
)
def test_what_is_not_text_says_where(data, says, tmp_path) -> None:
    (tmp_path / "data.zip").write_bytes(data)
    with pytest.raises(NotTextError, match=says) as caught:
        list(Document(str(tmp_path / "data.zip"), tmp_path / "data.zip").pieces())
    assert "data.zip" in str(caught.value) and "unpack it first" in str(caught.value)


def test_half_a_surrogate_pair() -> None:
    with pytest.raises(NotTextError, match="half a surrogate pair at character 1"):
        list(Document("row", "a\ud800").pieces())


def test_a_file_that_went_away(tmp_path) -> None:
    with pytest.raises(StorageError, match="must exist"):
        list(Document("gone", tmp_path / "gone").pieces())
