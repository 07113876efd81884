"""Tokenizers in the styles of published families: every token's bytes, what opens a document, and what is refused."""

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from turnout.errors import DataError
from turnout.measure import bits_per_byte
from turnout.train.data import Document, TokenSet, byte_lengths, load_tokenizer, prepare, windows
from turnout.train.data.spaced import spaced, token_texts
from turnout.train.data.tokenizer import check_tokenizer, opening_ids

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes"))

import published

STYLES, SPACED = tuple(published.STYLES), published.SPACED
TEXTS = [
    "a cat",
    "  a  cat\n\n x ",
    " one space",
    " ",
    "\n\tx",
    "déjà 例え 🙂 \0",
    "<s> </s> <0x0A> <|endoftext|> <bos>",
    "line\r\n   more",
]


def tokens_of(tmp_path: Path, style: str, texts: list[str], change: Any = None) -> TokenSet:
    published.write(tmp_path, style)
    if change is not None:
        body = json.loads((tmp_path / "tokenizer.json").read_text())
        change(body)
        (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    documents = [Document(f"{n}.txt", text) for n, text in enumerate(texts)]
    return prepare({"d": documents}, tmp_path / "tokens", tokenizer=tmp_path, held_out=1.0, quiet=True)


def documents_of(tokens: TokenSet) -> list[list[int]]:
    starts = tokens.held_out.document_N.tolist()
    return [tokens.held_out.token_T[a:b].tolist() for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("style", STYLES)
def test_documents_are_opened_add_up_and_come_back(style, tmp_path):
    tokens = tokens_of(tmp_path, style, TEXTS)
    tokenizer = load_tokenizer(tmp_path)
    check_tokenizer(tokenizer, vocab_size=published.VOCAB)
    first = published.STYLES[style][2] or "<|endoftext|>"
    assert opening_ids(tokenizer) == (tokenizer.token_to_id(first),) == (tokens.separator_id,)
    found = documents_of(tokens)
    for text, ids in zip(TEXTS, found, strict=True):
        assert ids[0] == tokens.separator_id and tokens.separator_id not in ids[1:]
        assert tokens.byte_length_V[ids].sum() == len(text.encode())
        assert tokenizer.decode(ids[1:], skip_special_tokens=False) == text


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("seq", [1, 500])
def test_the_bytes_measured_are_those_of_the_texts(style, seq, tmp_path):
    tokens = tokens_of(tmp_path, style, TEXTS)
    uniform = lambda id_BS: type("Output", (), {"logits_BSV": torch.zeros(*id_BS.shape, 420), "routings": ()})()  # noqa: E731
    found = bits_per_byte(uniform, windows(tokens.held_out, batch=3, seq=seq), tokens.byte_length_V)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("style", STYLES)
def test_the_ids_are_those_of_transformers(style, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens = tokens_of(tmp_path, style, [text for text in TEXTS if not text.startswith(" ")] + ["the cat, it's"])
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    texts = [text for text in TEXTS if not text.startswith(" ") and "<s>" not in text] + ["the cat, it's"]
    found = documents_of(tokens)
    start = 0 if published.STYLES[style][2] else 1
    for text in texts:
        assert stock(text)["input_ids"] in [ids[start:] for ids in found]


@pytest.mark.parametrize(
    ("style", "kind"), [("llama2", "LlamaTokenizer"), ("mistral", "LlamaTokenizer"), ("gemma", "GemmaTokenizer")]
)
def test_the_classes_of_transformers_read_the_same(style, kind, tmp_path):
    """They put their own parts in the place of the file's; what they save is read as well."""
    transformers = pytest.importorskip("transformers")
    published.write(tmp_path, style)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text()) | {"tokenizer_class": kind}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    stock = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert type(stock).__name__ == kind
    stock.save_pretrained(tmp_path / "saved")
    for place in (tmp_path, tmp_path / "saved"):
        tokenizer = load_tokenizer(place)
        table = spaced(tokenizer)
        assert table is not None
        for text in ("the cat\n\n x", "déjà 🙂", "\tx"):
            assert stock(text)["input_ids"] == [*opening_ids(tokenizer), *table.encode([text], [False])[0]]


def test_a_unigram_whose_words_each_get_a_mark():
    """T5's and XLM-R's kind: fine where words are one space apart; what is squeezed is told."""
    pieces = [("<unk>", 0.0), ("</s>", 0.0), *((letter, -2.0) for letter in "▁Helothr,i's42ca"), ("▁cat", -1.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=False))
    tokenizer.add_special_tokens(["<unk>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    check_tokenizer(tokenizer)
    table = spaced(tokenizer)
    assert table is not None
    table.check("the cat", table.encode(["the cat"], [False])[0], "a")
    for text in ("the  cat", "the cat ", " the cat", "the zoo"):
        with pytest.raises(DataError, match="a, which it changes"):
            table.check(text, table.encode([text], [False])[0], "a")


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("unit", ["the cat, it's 7 déjà vu  and\n", "例え🙂", "cat\n"])
def test_long_documents_are_read_in_pieces(style, unit, tmp_path):
    """Spaces, none at all, and newlines at the seams."""
    text = unit * (150_000 // len(unit.encode()))
    tokens = tokens_of(tmp_path, style, [text])
    (ids,) = documents_of(tokens)
    assert tokens.byte_length_V[ids].sum() == len(text.encode())
    assert tokens.tokenizer.decode(ids[1:], skip_special_tokens=False) == text
    if " " in unit:
        assert ids[1:] == tokens.tokenizer.encode(text, add_special_tokens=False).ids


def test_parts_that_begin_with_a_space(tmp_path):
    published.write(tmp_path, "mistral")
    text = Document("a.txt", "the cat, it's 7 " * 500)
    tokens = prepare({"d": [text]}, tmp_path / "t", tokenizer=tmp_path, held_out=1.0, part_bytes=300, quiet=True)
    assert tokens.byte_length_V[tokens.held_out.token_T].sum() == len("the cat, it's 7 " * 500)


def _without_bytes(body: dict[str, Any]) -> None:
    vocab = body["model"]["vocab"]
    body["model"]["vocab"] = {token: n for token, n in vocab.items() if not token.startswith("<0x")}
    body["model"]["byte_fallback"] = False


def _normalized(kind: str, **more: Any) -> Any:
    def change(body: dict[str, Any]) -> None:
        before = body["normalizer"]
        parts = [{"type": kind, **more}, *([before] if before else [])]
        body["normalizer"] = {"type": "Sequence", "normalizers": parts}

    return change


def _told_apart(body: dict[str, Any]) -> None:
    body["added_tokens"].append(body["added_tokens"][-1] | {"id": 419, "content": "<t>", "special": False})


@pytest.mark.parametrize("style", ["llama2", "mistral", "gemma"])
@pytest.mark.parametrize(
    ("change", "text", "words"),
    [
        (_without_bytes, "the é cat", r"b\.txt, which it changes.*: 'é cat' to"),
        (_normalized("NFKC"), "the ﬁne cat", r"b\.txt, which .*NFKC.*: 'ﬁne cat' to 'fine cat'.*as NFKC does before"),
        (_normalized("Strip", strip_left=True, strip_right=True), "cat ", r"b\.txt.* ' ' to ''"),
        (_normalized("Replace", pattern={"Regex": " {2,}"}, content=" "), "the  cat", r"' cat' to 'cat'"),
        (lambda body: None, "the ▁ cat", r"b\.txt, which it changes.*'▁ cat' to '  cat'.*leave that text out"),
    ],
)
def test_texts_that_are_changed_are_told_by_name(style, change, text, words, tmp_path):
    texts = [Document("a.txt", "the cat"), Document("b.txt", text)]
    published.write(tmp_path, style)
    body = json.loads((tmp_path / "tokenizer.json").read_text())
    change(body)
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    prepare({"d": texts[:1]}, tmp_path / "t", tokenizer=tmp_path, held_out=1.0, quiet=True)
    with pytest.raises(DataError, match=words):
        prepare({"d": texts}, tmp_path / "t", tokenizer=tmp_path, held_out=1.0, quiet=True)


def test_lower_case_is_refused_at_once(tmp_path):
    with pytest.raises(DataError, match="be lossless, byte-level or of SentencePiece's kind"):
        tokens_of(tmp_path, "llama2", ["the cat"], _normalized("Lowercase"))


def test_a_ladder_of_spaces_behind_an_added_token(tmp_path):
    """The legacy normalizer puts a ▁ behind each added token too, which no text holds: that is seen."""
    with pytest.raises(DataError, match=r"0\.txt, which it changes.*"):
        tokens_of(tmp_path, "llama2", ["the <t> cat"], _told_apart)
    tokens = tokens_of(tmp_path, "gemma", ["the <t> cat\n\n\n"], _told_apart)
    assert tokens.byte_length_V[tokens.held_out.token_T].sum() == 14


def test_each_token_as_text():
    body = published.published("llama2")
    tokenizer = published.Tokenizer.from_str(json.dumps(body))
    ids = tokenizer.encode("the cat").ids
    assert "".join(token_texts(tokenizer, ids)) == "<s> the cat"


def test_two_tokens_that_open(tmp_path):
    def change(body: dict[str, Any]) -> None:
        template = body["post_processor"]
        template["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}
        template["single"].insert(0, {"SpecialToken": {"id": "</s>", "type_id": 0}})

    tokens = tokens_of(tmp_path, "llama2", ["a cat", "cats"], change)
    assert [ids[:2] for ids in documents_of(tokens)] == [[2, 1], [2, 1]]
    uniform = lambda id_BS: type("Output", (), {"logits_BSV": torch.zeros(*id_BS.shape, 420), "routings": ()})()  # noqa: E731
    for seq in (1, 9):
        found = bits_per_byte(uniform, windows(tokens.held_out, batch=3, seq=seq), tokens.byte_length_V)
        assert (found.bytes, found.tokens) == (9, sum(len(ids) - 1 for ids in documents_of(tokens)))


def test_a_byte_level_tokenizer_is_no_such_one():
    assert spaced(published.Tokenizer.from_str(json.dumps(published.published("llama3")))) is None
    assert (byte_lengths(published.Tokenizer.from_str(json.dumps(published.published("gemma")))) >= 0).all()
