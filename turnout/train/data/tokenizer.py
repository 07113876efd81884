"""Byte-level BPE trained on the spot, or a tokenizer loaded; every token stands for a known number of bytes."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from turnout.errors import CheckpointError, DataError, TurnoutError, UsageError, word
from turnout.reading import TOKENIZER_BYTES, Refuse, parse_json, read_text
from turnout.train.data.spaced import apart, spaced

__all__ = [
    "SEPARATOR",
    "byte_lengths",
    "check_tokenizer",
    "load_tokenizer",
    "opening_ids",
    "separator_id",
    "train_tokenizer",
]

SEPARATOR = "<|endoftext|>"
_SEPARATORS = (SEPARATOR, "<|end_of_text|>", "<|begin_of_text|>", "<|im_end|>", "</s>", "<eos>", "<s>", "[SEP]")
_SEPARATORS += ("<\uff5cend\u2581of\u2581sentence\uff5c>",)  # of DeepSeek, with bars and blanks of their own
# Sixteen times the largest vocabulary in use: a table of eight bytes a token stays at 32 MiB.
_IDS = 1 << 22
_SMALLEST = 257  # every byte, and the separator
_PROBE = "Hello  there,\n\tit's 42 <s> – déjà vu 例え 🙂 \r\n  <|endoftext|> x\u00a0y "
# Of SentencePiece's kind: what its vocabulary lacks is told by the text that holds it.
_PLAIN = "Hello there, it's 42"
_WHERE = "turnout.train.data"


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """A byte-level BPE tokenizer with exactly ``vocab_size`` tokens, the same for the same texts in any order.

    Token 0 is ``<|endoftext|>``, tokens 1 to 256 are the bytes, the others pairs merged by frequency (at least 2).
    Text is cut into words by GPT-2's pattern first; nothing is normalised, so decoding gives the bytes back.

    Args:
        texts: the sample; all of it is held in memory as word counts.
        vocab_size: V, at least 257.

    Raises:
        UsageError: vocab_size below 257.
        DataError: the texts do not hold enough repeated pairs; says how many tokens they support.

    >>> tokenizer = train_tokenizer(["the cat, the dog"] * 2, vocab_size=260)
    >>> tokenizer.encode("the").tokens, tokenizer.token_to_id("<|endoftext|>")
    (['the'], 0)

    Source: Sennrich et al., 2016, "Neural Machine Translation of Rare Words with Subword Units"; on bytes as in Radford
    et al., 2019, "Language Models are Unsupervised Multitask Learners". The ``tokenizers`` library does the work.
    """
    if vocab_size < _SMALLEST:
        raise UsageError(
            word(
                "vocab_size",
                got=vocab_size,
                allowed=f"be at least {_SMALLEST} (256 bytes and the separator)",
                where=_WHERE,
                fix=f"pass vocab_size={_SMALLEST}",
            )
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    found = tokenizer.get_vocab_size()
    if found < vocab_size:
        raise DataError(
            word(
                "vocab_size",
                got=vocab_size,
                allowed=f"be at most {found}, which is what so little text supports,",
                where=_WHERE,
                fix=f"pass vocab_size={found}, or give more text",
            )
        )
    tokenizer.encode_special_tokens = True
    return tokenizer


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a ``tokenizer.json``; special tokens that stand in a text are read as plain text.

    Args:
        path: the file, or a folder that holds a ``tokenizer.json``.

    Raises:
        CheckpointError: there is no such file, or it is not a tokenizer.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "tokenizer.json"
    >>> train_tokenizer(["a cat, a cat"], vocab_size=258).save(str(path))
    >>> load_tokenizer(path).get_vocab_size()
    258

    Source: none; the file format of the ``tokenizers`` library.
    """
    path = Path(path)
    tokenizer = open_tokenizer(path / "tokenizer.json" if path.is_dir() else path)
    tokenizer.encode_special_tokens = True
    return tokenizer


def open_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer as its file says, special tokens in a text included, but for what it cuts and pads batches to.

    The file is read with bounds before the library sees it, which trusts what it says: an id of 2^31 alone would take
    16 GiB.

    Raises:
        CheckpointError: there is no such file, or it is not a tokenizer.

    >>> open_tokenizer(Path("no/tokenizer.json"))
    Traceback (most recent call last):
    turnout.errors.CheckpointError: the tokenizer must be a tokenizer.json of the tokenizers library in ...

    Source: none; the file format of the ``tokenizers`` library.
    """

    def refuse(problem: str) -> CheckpointError:
        got, allowed = f"{path} ({problem})", "be a tokenizer.json of the tokenizers library"
        fix = "check the path, or leave tokenizer out to train one"
        return CheckpointError(word("the tokenizer", got=got, allowed=allowed, where=_WHERE, fix=fix))

    try:
        text = read_text(path, refuse=refuse, limit=TOKENIZER_BYTES)
        _check_ids(parse_json(text, refuse), refuse)
        tokenizer = Tokenizer.from_str(text)
    except TurnoutError:
        raise
    except Exception as error:  # the library raises plain Exception for whatever it cannot parse
        raise refuse(str(error)) from error
    # Settings for batches of one model's prompts: of a text, they would cut off what is long, or add to what is short.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _check_ids(body: Mapping[str, Any], refuse: Refuse) -> None:
    """Refuses an id far beyond the number of tokens: everything that is counted by token is as long as the last id."""
    model = body.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    ids = list(vocab.values()) if isinstance(vocab, dict) else []
    added = body.get("added_tokens")
    ids += [token.get("id") for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    wrong = [number for number in ids if type(number) is not int or not 0 <= number < _IDS]
    if wrong:
        raise refuse(f"the token id {wrong[0]!r:.40}, where ids are whole numbers below {_IDS:,}")


def byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    """(V,) int64, the UTF-8 bytes that each token stands for; special tokens 0.

    A byte-level token is written with one character of GPT-2's alphabet for each byte, so its length says it. In one of
    SentencePiece's kind ▁ is a space and ``<0xE2>`` one byte. Where that kind puts a ▁ before a text, which stands for
    nothing, the token that opens a document takes it off again: it stands for -1. So the tokens of a document, with
    that one, add up to its bytes.

    >>> byte_lengths(train_tokenizer(["a cat, a cat"], vocab_size=258)).tolist()[:3]
    [0, 1, 1]

    Source: the alphabet of Radford et al., 2019, "Language Models are Unsupervised Multitask Learners".
    """
    if (table := spaced(tokenizer)) is not None:
        length_V = table.length_V
        if table.prefix:
            length_V[opening_ids(tokenizer)[-1]] = -1
        return length_V
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    length_V = np.zeros(max(vocabulary.values(), default=-1) + 1, np.int64)
    added = tokenizer.get_added_tokens_decoder()
    for token, number in vocabulary.items():
        if number not in added:
            length_V[number] = len(token)
        elif not added[number].special:
            length_V[number] = len(token.encode())
    return length_V


def own_opening(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that the tokenizer by itself puts before a text (its BOS); empty where it puts none.

    >>> own_opening(train_tokenizer(["a cat, a cat"], vocab_size=258))
    ()

    Source: none; the post-processor of the ``tokenizers`` library.
    """
    whole, plain = tokenizer.encode("a").ids, tokenizer.encode("a", add_special_tokens=False).ids
    starts = (at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
    return tuple(whole[: next(starts, 0)]) if plain else ()


def opening_ids(tokenizer: Tokenizer, *, needed: bool = True) -> tuple[int, ...]:
    """The tokens that open a document, in training and in measuring: the tokenizer's own BOS, or the separator.

    Args:
        tokenizer: a loaded one.
        needed: False for none where there is neither.

    Raises:
        DataError: it puts nothing before a text, and has none of the known separators.

    >>> opening_ids(train_tokenizer(["a cat, a cat"], vocab_size=258))
    (0,)

    Source: none; what each model's tokenizer says.
    """
    if own := own_opening(tokenizer):
        return own
    known = any(tokenizer.token_to_id(name) is not None for name in _SEPARATORS)
    return (separator_id(tokenizer),) if needed or known else ()


def separator_id(tokenizer: Tokenizer) -> int:
    """The special token between documents: ``<|endoftext|>``, or what else there is.

    A token of that name that is not special is none: it would be read in a text too, and end a document there.

    Raises:
        DataError: it has none of the known ones.

    >>> separator_id(train_tokenizer(["a cat, a cat"], vocab_size=258))
    0

    Source: none; the names that published tokenizers use.
    """
    added = tokenizer.get_added_tokens_decoder()
    for name in _SEPARATORS:
        number = tokenizer.token_to_id(name)
        if number is not None and number in added and added[number].special:
            return number
    raise DataError(
        word(
            "the tokenizer",
            got="one with none of them",
            allowed=f"have one of the special tokens {', '.join(_SEPARATORS)} to separate documents",
            where=_WHERE,
            fix=f"add {SEPARATOR} to it with add_special_tokens, and save it",
        )
    )


def check_tokenizer(tokenizer: Tokenizer, *, vocab_size: int | None = None) -> None:
    """Sees that the tokenizer keeps every byte, so that bits per byte can be counted, and fits.

    It is byte-level, or of SentencePiece's kind.

    That is seen on one sentence; ``check_text`` sees it on every text.

    Args:
        tokenizer: a loaded one.
        vocab_size: the vocabulary of the model that will read its tokens; None for any.

    Raises:
        DataError: it changes text, gives other tokens each time, or its tokens do not say how many bytes they stand
            for.
        UsageError: it has more tokens than ``vocab_size``.

    >>> check_tokenizer(train_tokenizer(["a cat, a cat"], vocab_size=258), vocab_size=300)

    Source: none; plain bookkeeping.
    """
    opening_ids(tokenizer)
    refuse_chance(tokenizer)
    length_V = byte_lengths(tokenizer)
    if not _keeps_probe(tokenizer, length_V):
        raise DataError(
            word(
                "the tokenizer",
                got="one that adds, drops or changes bytes of a test sentence",
                allowed="be lossless, byte-level or of SentencePiece's kind, or bits per byte would be wrong,",
                where=_WHERE,
                fix="choose one that keeps case, accents and spaces, or leave tokenizer out to train one",
            )
        )
    if vocab_size is not None and len(length_V) > vocab_size:
        raise UsageError(
            word(
                "vocab_size",
                got=vocab_size,
                allowed=f"be at least the {len(length_V)} tokens of the tokenizer",
                where=_WHERE,
                fix=f"pass vocab_size={len(length_V)}",
            )
        )


def _keeps_probe(tokenizer: Tokenizer, length_V: np.ndarray) -> bool:
    """Whether a sentence comes back as it was."""
    if (table := spaced(tokenizer)) is not None:
        (ids,) = table.encode([_PLAIN], [False])
        back = tokenizer.decode(ids, skip_special_tokens=False).removeprefix(" ")
        return back == _PLAIN and table.spells(_PLAIN, ids)
    ids = tokenizer.encode(_PROBE, add_special_tokens=False).ids
    return tokenizer.decode(ids, skip_special_tokens=False) == _PROBE and length_V[ids].sum() == len(_PROBE.encode())


def refuse_chance(tokenizer: Tokenizer) -> None:
    """Refuses a tokenizer that cuts the same text in another way each time.

    >>> refuse_chance(train_tokenizer(["a cat, a cat"], vocab_size=258))

    Source: Provilkov et al., 2020, "BPE-Dropout", which is for training alone.
    """
    dropout = getattr(tokenizer.model, "dropout", None)
    if dropout:
        fix = "set model.dropout to null in its tokenizer.json"
        allowed = "cut a text the same way each time"
        raise DataError(
            word("the tokenizer", got=f"one with dropout={dropout}", allowed=allowed, where=_WHERE, fix=fix)
        )


def check_text(tokenizer: Tokenizer, length_V: np.ndarray, text: str, ids: Sequence[int], name: str) -> None:
    """Sees that these tokens are this text, byte for byte: what one sentence cannot tell of all texts.

    Args:
        tokenizer: that made them.
        length_V: its ``byte_lengths``.
        text: a document, or a piece of one.
        ids: its tokens.
        name: of the document.

    Raises:
        DataError: the tokenizer changed the text, or the tokens' bytes are not as many as the text's.

    >>> tokenizer = train_tokenizer(["a cat, a cat"], vocab_size=258)
    >>> check_text(tokenizer, byte_lengths(tokenizer), "cat", tokenizer.encode("cat").ids, "a.txt")

    Source: none; a sum.
    """
    counted, size = int(length_V[np.asarray(ids, np.int64)].sum()), len(text.encode())
    normalizer = tokenizer.normalizer
    if normalizer is not None and (changed := normalizer.normalize_str(text)) != text:
        kind = type(normalizer).__name__
        got = f"{name}, which its normalizer ({kind}) changes: {apart(text, changed)}"
        fix = f"write the text as {kind} does before" if kind in ("NFC", "NFD", "NFKC", "NFKD") else "choose another"
    elif counted != size:
        got = f"{name}, of whose {size} bytes it " + (f"loses {size - counted}" if counted < size else "makes more")
        fix = "choose a byte-level BPE without prefix space"
    else:
        return
    allowed = "keep every byte of every text, or bits per byte would be wrong,"
    fix += ", or leave tokenizer out to train one"
    raise DataError(word("the tokenizer", got=got, allowed=allowed, where=_WHERE, fix=fix))


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """The token ids of each text, on all cores.

    >>> tokenizer = train_tokenizer(["a cat, a cat"], vocab_size=258)
    >>> [len(ids) for ids in encode(tokenizer, ["a", "<|endoftext|>"])]
    [1, 13]

    Source: none; the ``tokenizers`` library does the work.
    """
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]
