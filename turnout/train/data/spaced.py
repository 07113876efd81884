"""SentencePiece's kind of tokenizer: ▁ stands for a space, <0xE2> for a byte, one ▁ before a text for nothing."""

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer

from turnout.errors import DataError, word

__all__ = ["Spaced", "apart", "spaced", "token_texts"]

_MARK = "▁"
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WHERE = "turnout.train.data"
_FORMS = ("NFC", "NFD", "NFKC", "NFKD")


@dataclasses.dataclass(frozen=True, eq=False)
class Spaced:
    """A tokenizer whose tokens spell text with ▁ for a space, and what each of them stands for.

    Args:
        tokenizer: the loaded one.
        bytes_V: what each token stands for; nothing for special ones.
        prefix: it puts a ▁ before a text, which stands for no byte of it.
        swallows: it does so only where the text does not begin with a space.

    >>> from tokenizers import decoders, models, pre_tokenizers
    >>> tokenizer = Tokenizer(models.BPE({"▁": 0, "a": 1, "▁a": 2}, [("▁", "a")]))
    >>> tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    >>> found = spaced(tokenizer)
    >>> found.bytes_V, found.prefix, found.encode(["a a", " a"], [False, True])
    ([b' ', b'a', b' a'], True, [[2, 2], [2]])

    Source: Kudo & Richardson, 2018, "SentencePiece"; byte fallback as in Touvron et al., 2023, "LLaMA".
    """

    tokenizer: Tokenizer
    bytes_V: list[bytes]
    prefix: bool
    swallows: bool

    @functools.cached_property
    def length_V(self) -> np.ndarray:
        """(V,) int64, the bytes that each token stands for."""
        return np.array([len(piece) for piece in self.bytes_V], np.int64)

    @functools.cached_property
    def _within(self) -> Tokenizer:
        """The same, without the ▁ before a text: for pieces that go on."""
        if not self.prefix:
            return self.tokenizer
        body = json.loads(self.tokenizer.to_str())
        body["normalizer"], body["pre_tokenizer"] = (
            _unprefixed(body[name]) for name in ("normalizer", "pre_tokenizer")
        )
        found = Tokenizer.from_str(json.dumps(body))
        found.encode_special_tokens = self.tokenizer.encode_special_tokens
        return found

    def _fed(self, text: str, within: bool) -> str:
        """What the tokenizer is given: where it would take a first space for its own ▁, one more, as SentencePiece."""
        return " " + text if self.swallows and not within and text.startswith(" ") else text

    def encode(self, texts: Sequence[str], within: Sequence[bool]) -> list[list[int]]:
        """The token ids of each text, on all cores; ``within`` says which of them are not the start of a document."""
        found = dict[int, list[int]]()
        for side, tokenizer in ((False, self.tokenizer), (True, self._within if any(within) else self.tokenizer)):
            which = [n for n, inside in enumerate(within) if inside is side]
            batch = [self._fed(texts[n], side) for n in which]
            made = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
            found |= {n: encoding.ids for n, encoding in zip(which, made, strict=True)}
        return [found[n] for n in range(len(texts))]

    def read(self, text: str, *, within: bool) -> tuple[Encoding, str, list[int] | None]:
        """Its tokens, the text that their offsets are of, and the bytes of each: None where they do not spell it."""
        fed = self._fed(text, within)
        found = (self._within if within else self.tokenizer).encode(fed, add_special_tokens=False)
        sizes = [len(self.bytes_V[token]) for token in found.ids]
        if not self.spells(text, found.ids, within=within):
            return found, fed, None
        if sizes and self.prefix and not within:
            sizes[0] -= 1
        return found, fed, sizes

    def _spelt(self, ids: Sequence[int], within: bool) -> bytes:
        whole = b"".join(map(self.bytes_V.__getitem__, ids))
        return whole.removeprefix(b" ") if self.prefix and not within else whole

    def spells(self, text: str, ids: Sequence[int], *, within: bool = False) -> bool:
        """Whether these tokens are this text, byte for byte, behind the ▁ that stands for nothing."""
        whole = b"".join(map(self.bytes_V.__getitem__, ids))
        mark = b" " if ids and self.prefix and not within else b""
        return whole == mark + text.encode()

    def check(self, text: str, ids: Sequence[int], name: str, *, within: bool = False) -> None:
        """Sees that these tokens are this text, byte for byte.

        Args:
            text: a document, or a piece of one.
            ids: its tokens.
            name: of the document.
            within: the piece is not the start of its document.

        Raises:
            DataError: the tokenizer changed the text, or has no tokens for some of it.
        """
        if self.spells(text, ids, within=within):
            return
        kinds = [part["type"] for part in _parts(self.tokenizer.normalizer, "normalizers")]
        by = f" (normalizer {', '.join(kinds)})" if kinds else ""
        got = f"{name}, which it changes{by}: {apart(text, self._spelt(ids, within).decode(errors='replace'))}"
        form = next((kind for kind in kinds if kind in _FORMS), None)
        fix = f"write the text as {form} does before" if form else "change those characters, or leave that text out"
        allowed = "keep every byte of every text, or bits per byte would be wrong,"
        raise DataError(word("the tokenizer", got=got, allowed=allowed, where=_WHERE, fix=fix))


def spaced(tokenizer: Tokenizer) -> Spaced | None:
    """How a tokenizer of SentencePiece's kind reads; None for another kind, byte-level ones among them.

    Source: none; the file format of the ``tokenizers`` library.
    """
    decoders = _parts(tokenizer.decoder, "decoders")
    if not any(_turns_marks(part) for part in decoders):
        return None
    fallback = any(part["type"] == "ByteFallback" for part in decoders)
    vocabulary, added = tokenizer.get_vocab(with_added_tokens=True), tokenizer.get_added_tokens_decoder()
    silent = {number for number, token in added.items() if token.special}
    unknown = getattr(tokenizer.model, "unk_token", None)
    bytes_V = [b""] * (max(vocabulary.values(), default=-1) + 1)
    for token, number in vocabulary.items():
        if number not in silent and token != unknown:
            byte = _BYTE.fullmatch(token) if fallback else None
            bytes_V[number] = bytes([int(byte[1], 16)]) if byte else token.replace(_MARK, " ").encode()
    once, twice = (
        b"".join(bytes_V[token] for token in tokenizer.encode(text, add_special_tokens=False).ids)
        for text in ("a", " a")
    )
    prefix = once.startswith(b" ")
    return Spaced(tokenizer, bytes_V, prefix, prefix and not twice.startswith(b"  "))


def token_texts(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token as text by itself, with the space that it begins with.

    Source: none; plain bookkeeping.
    """
    table = spaced(tokenizer)
    known = [b"" if table is None else table.bytes_V[token] for token in ids]
    return [
        piece.decode(errors="replace") if piece else tokenizer.decode([token], skip_special_tokens=False)
        for token, piece in zip(ids, known, strict=True)
    ]


def apart(one: str, other: str) -> str:
    """Where two texts differ first.

    >>> apart("a long word", "a long sword")
    "'word' to 'sword'"

    Source: none; a comparison.
    """
    at = next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return f"{one[at : at + 8]!r} to {other[at : at + 8]!r}"


def _parts(component: Any, name: str) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as its file says it, sequences flattened."""
    return _flat(json.loads(component.__getstate__()), name) if component is not None else []


def _flat(part: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [one for inner in part[name] for one in _flat(inner, name)] if part["type"] == "Sequence" else [part]


def _turns_marks(part: dict[str, Any]) -> bool:
    """Whether a decoder makes spaces of ▁."""
    if part["type"] == "Metaspace":
        return part.get("replacement", _MARK) == _MARK
    return part["type"] == "Replace" and part.get("pattern") == {"String": _MARK} and part.get("content") == " "


def _unprefixed(part: dict[str, Any] | None) -> dict[str, Any] | None:
    """The same without what puts a ▁ before a text."""
    if part is None or part["type"] == "Prepend":
        return None
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    for name in ("normalizers", "pretokenizers"):
        if part["type"] == "Sequence" and name in part:
            return part | {name: [one for one in map(_unprefixed, part[name]) if one is not None]}
    return part
