"""The tokenizer: deterministic, lossless, and it knows its bytes."""

import importlib
import json
import os
import random
import subprocess
import sys
import unicodedata

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from turnout.errors import CheckpointError, DataError, UsageError
from turnout.train.data import Document, prepare
from turnout.train.data.tokenizer import (
    SEPARATOR,
    byte_lengths,
    check_tokenizer,
    encode,
    load_tokenizer,
    separator_id,
    train_tokenizer,
)

TEXTS = ["the cat sat on the mat", "le chat était là, là-bas", "猫は猫です 🙂🙂", "x = 1\n\ty += x  # cat"] * 3


def test_the_same_texts_in_any_order_give_the_same_tokenizer() -> None:
    first = train_tokenizer(TEXTS, vocab_size=290).to_str()
    for seed in range(5):
        shuffled = random.Random(seed).sample(TEXTS, len(TEXTS))
        assert train_tokenizer(shuffled, vocab_size=290).to_str() == first, seed


@pytest.mark.parametrize("text", [*TEXTS, "", "\0\x7f", "un<|endoftext|>seen\r\n", "\ufeffé\u0301", "  \n\n\t "])
def test_bytes_add_up_and_come_back(text) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=290)
    (ids,) = encode(tokenizer, [text])
    assert byte_lengths(tokenizer)[ids].sum() == len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert 0 not in ids  # a separator that stands in a text is plain text


def test_layout_of_the_vocabulary() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=290)
    length_V = byte_lengths(tokenizer)
    assert tokenizer.token_to_id(SEPARATOR) == separator_id(tokenizer) == 0
    assert len(length_V) == 290 and length_V[0] == 0
    assert (length_V[1:257] == 1).all() and (length_V[257:] >= 2).all()


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="pass vocab_size=257"):
        train_tokenizer(TEXTS, vocab_size=256)
    with pytest.raises(
        DataError, match=r"vocab_size must be at most (\d+).*pass vocab_size=\1, or give more text"
    ) as e:
        train_tokenizer(TEXTS, vocab_size=5000)
    most = int(str(e.value).rpartition("vocab_size=")[2].partition(",")[0])
    assert train_tokenizer(TEXTS, vocab_size=most).get_vocab_size() == most


def test_there_and_back(tmp_path) -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=290)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = load_tokenizer(path)
        assert encode(loaded, TEXTS) == encode(tokenizer, TEXTS)
        assert encode(loaded, [SEPARATOR])[0] != [0]
    with pytest.raises(CheckpointError, match=r"nowhere\.json"):
        load_tokenizer(tmp_path / "nowhere.json")
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"be a tokenizer\.json"):
        load_tokenizer(tmp_path)


def _other(*, special=SEPARATOR, prefix=False, normalizer=None, pre=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    if normalizer:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre or pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=280, special_tokens=[special], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.encode_special_tokens = True
    return tokenizer


def test_a_tokenizer_from_elsewhere_must_keep_every_byte() -> None:
    check_tokenizer(_other())
    check_tokenizer(_other(special="</s>"))
    for lossy in (
        _other(prefix=True),
        _other(normalizer=normalizers.Lowercase()),
        _other(pre=pre_tokenizers.Whitespace()),
    ):
        with pytest.raises(DataError, match="lossless"):
            check_tokenizer(lossy)
    with pytest.raises(DataError, match="to separate documents"):
        check_tokenizer(_other(special="[strange]"))
    with pytest.raises(UsageError, match="pass vocab_size=280"):
        check_tokenizer(_other(), vocab_size=279)


NAIVE = "naïve café, Việt Nam, Ångström "


def test_a_normalizer_is_told_by_the_texts_that_it_changes(tmp_path) -> None:
    _other(normalizer=normalizers.NFC()).save(str(tmp_path / "tokenizer.json"))
    texts = [Document(f"{n}.txt", NAIVE * n) for n in range(1, 9)]
    tokens = prepare({"d": texts}, tmp_path / "a", tokenizer=tmp_path, held_out=1.0, quiet=True)
    assert tokens.byte_length_V[tokens.held_out.token_T].sum() == sum(len(NAIVE.encode()) * n for n in range(1, 9))
    texts.append(Document("decomposed.txt", unicodedata.normalize("NFD", NAIVE)))
    with pytest.raises(
        DataError, match=r"decomposed\.txt, which its normalizer \(NFC\) changes.*write the text as NFC"
    ):
        prepare({"d": texts}, tmp_path / "b", tokenizer=tmp_path, held_out=1.0, quiet=True)
    assert not (tmp_path / "b" / "tokens.json").exists()


@pytest.mark.parametrize("normalizer", [normalizers.Replace("q", "qqq"), normalizers.Replace("q", "x")])
def test_a_replacement_that_the_probe_does_not_hold(normalizer, tmp_path) -> None:
    """Also one of as many bytes, which no sum shows."""
    _other(normalizer=normalizer).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(DataError, match=r"a\.txt, which its normalizer \(Replace\) changes: 'q?u?ite"):
        prepare({"d": [Document("a.txt", "quite so")]}, tmp_path / "out", tokenizer=tmp_path, held_out=1.0, quiet=True)


def test_bytes_that_a_tokenizer_does_not_know(tmp_path) -> None:
    tokenizer = _other()
    body = json.loads(tokenizer.to_str())
    byte = next(token for token in body["model"]["vocab"] if token == "Z")
    kept = {token: number for token, number in body["model"]["vocab"].items() if byte not in token}
    body["model"]["vocab"] = {token: number for number, token in enumerate(kept)}
    body["model"]["merges"] = [pair for pair in body["model"]["merges"] if byte not in "".join(pair)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    with pytest.raises(DataError, match=r"z\.txt, of whose 6 bytes it loses 2"):
        prepare({"d": [Document("z.txt", "aZ bZ!")]}, tmp_path / "o", tokenizer=tmp_path, held_out=1.0, quiet=True)


def test_dropout_is_refused(tmp_path) -> None:
    tokenizer = _other()
    tokenizer.model.dropout = 0.1
    with pytest.raises(DataError, match=r"dropout=0\.1"):
        check_tokenizer(tokenizer)


def test_truncation_and_padding_are_not_for_texts(tmp_path) -> None:
    tokenizer = _other()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=100)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (ids,) = encode(load_tokenizer(tmp_path), ["the cat sat on the mat"])
    assert byte_lengths(tokenizer)[ids].sum() == 22 and 4 < len(ids) < 100


def test_added_tokens_have_their_bytes(tmp_path) -> None:
    tokenizer = _other()
    tokenizer.add_tokens(["<tool>", AddedToken(" été", normalized=False)])
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    text = "the <tool> in été <|im_end|> <|endoftext|>"
    tokens = prepare({"d": [Document("a", text)]}, tmp_path / "o", tokenizer=tmp_path, held_out=1.0, quiet=True)
    assert tokens.byte_length_V[tokens.held_out.token_T].sum() == len(text.encode())


def test_a_preparation_from_before_texts_were_checked_is_done_again(tmp_path, monkeypatch) -> None:
    _other(normalizer=normalizers.NFC()).save(str(tmp_path / "tokenizer.json"))
    texts = [Document("a", unicodedata.normalize("NFD", NAIVE))]
    with monkeypatch.context() as patch:
        module = importlib.import_module("turnout.train.data.prepare")  # the package has the function under this name
        patch.setattr(module, "check_text", lambda *_: None)
        patch.setattr(module, "_checked", lambda fingerprint: fingerprint)
        prepare({"d": texts}, tmp_path / "o", tokenizer=tmp_path, held_out=1.0, quiet=True)
    with pytest.raises(DataError, match="NFC"):
        prepare({"d": texts}, tmp_path / "o", tokenizer=tmp_path, held_out=1.0, quiet=True)


FORK = """
import os, warnings
from turnout.train.data.tokenizer import encode, train_tokenizer
tokenizer = train_tokenizer(["a cat, a cat"] * 50, vocab_size=258)
encode(tokenizer, ["a cat"] * 5000)
warnings.simplefilter("ignore")
child = os.fork()
if child == 0:
    print("child", len(encode(tokenizer, ["a cat"] * 5000)), flush=True)
    os._exit(0)
os.waitpid(child, 0)
"""


@pytest.mark.slow
def test_a_fork_after_tokenising_works_and_is_quiet() -> None:
    """Older versions of the tokenizers library warned in every such child."""
    environ = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    command = [sys.executable, "-c", FORK]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert (done.stdout, done.stderr) == ("child 5000\n", "")


def test_a_separator_that_is_not_special_is_none(tmp_path) -> None:
    """It would be read in a text, end a document there, and its bytes be counted with nothing predicted for them."""
    body = json.loads(train_tokenizer(TEXTS, vocab_size=290).to_str())
    body["added_tokens"][0]["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(body))
    plain = load_tokenizer(tmp_path)
    assert 0 in encode(plain, [f"a{SEPARATOR}b"])[0], "as the library does"
    with pytest.raises(DataError, match=r"special tokens .* to separate documents"):
        check_tokenizer(plain)
    plain.add_special_tokens(["</s>"])
    assert separator_id(plain) == plain.token_to_id("</s>")


def test_the_separator_of_deepseek() -> None:
    body = train_tokenizer(TEXTS, vocab_size=290).to_str()
    named = Tokenizer.from_str(body.replace(SEPARATOR, "<\uff5cend\u2581of\u2581sentence\uff5c>"))
    assert separator_id(named) == 0
