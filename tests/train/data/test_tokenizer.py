"""The tokenizer: deterministic, lossless, and it knows its bytes."""

import os
import random
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from turnout.errors import CheckpointError, DataError, UsageError
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
