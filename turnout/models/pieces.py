"""The text of a row as its tokens come: never half a character, never the beginning of what it is to stop at."""

from collections.abc import Sequence
from typing import Any, Protocol

from turnout.errors import UsageError, word

__all__ = ["Pieces", "Reader", "reader_of", "stops_of"]

# How a decoder writes bytes that are no character, or not yet one.
_BROKEN = "\ufffd"
# How many tokens before the first new one a decoder is shown, so that it knows that no text begins there.
_BEFORE = 8


class Reader(Protocol):
    """What turns tokens into text: a tokenizer of ``tokenizers``, or one of transformers.

    Source: none; the method that both have.
    """

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of these tokens."""


class Pieces:
    """The text of one row, piece by piece, and whether it has come to where it stops.

    Args:
        reader: of its tokens.
        prompt: the token ids before the first new one.
        stop: the texts to stop at.
        keep_stop: whether the text ends with the one that it stopped at, rather than before it.

    >>> from tokenizers import Tokenizer, decoders, models
    >>> words = Tokenizer(models.BPE({"a": 0, "b": 1, "<0xC3>": 2, "<0xA9>": 3}, []))
    >>> words.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    >>> pieces = Pieces(words, [0], stop=["ba"])
    >>> [pieces.add(token) for token in (2, 3, 1, 1, 0)], pieces.stopped, pieces.text
    (['', 'é', '', 'b', ''], True, 'éb')

    Source: none. Tokens are decoded beside those before them, as text-generation-inference does it.
    """

    def __init__(self, reader: Reader, prompt: Sequence[int], stop: Sequence[str] = (), keep_stop: bool = False):
        self._reader, self._stop, self._keep_stop = reader, tuple(stop), keep_stop
        self._special = {number: text for text in stop if (number := _special(reader, text)) is not None}
        self._ids = list(prompt[-_BEFORE:])
        # Tokens from here to there are decoded already, and shown again beside new ones.
        self._from, self._to = 0, len(self._ids)
        self._held, self._said, self.stopped = "", [], False

    @property
    def text(self) -> str:
        """All that was given out."""
        return "".join(self._said)

    def add(self, token: int) -> str:
        """What is certain of the text with this token, beyond what was given out before; mostly the token's own."""
        if token in self._special:
            self._held += self._decoded(last=True)
            if not self._find():
                self._held += self._special[token] if self._keep_stop else ""
                self.stopped = True
            return self._give(len(self._held))
        self._ids.append(token)
        self._held += self._decoded(last=False)
        return self._give(len(self._held) if self._find() else len(self._held) - self._begun())

    def add_end(self, token: int) -> str:
        """What is left of the text with the token that ended it, whose own text is no part of it unless that is kept.

        A special token has no text anyway; some tokenizers have plain ones that end a turn.
        """
        said = self.add(token) if self._keep_stop or token in self._special else ""
        return said + self.end()

    def end(self) -> str:
        """What is left when no token follows: bytes that became no character, and a stop that only began."""
        if not self.stopped:
            self._held += self._decoded(last=True)
            self._find()
        return self._give(len(self._held))

    def _decoded(self, *, last: bool) -> str:
        """The text of the tokens that were not decoded yet; nothing while they may end within a character."""
        if self._to == len(self._ids):
            return ""
        before = self._reader.decode(self._ids[self._from : self._to], skip_special_tokens=True)
        whole = self._reader.decode(self._ids[self._from :], skip_special_tokens=True)
        if whole.endswith(_BROKEN) and not last:
            return ""
        # A prompt may end within a character, which the first tokens then complete; what they leave broken was there.
        while self._from == 0 and before.endswith(_BROKEN) and not whole.startswith(before):
            before = before[: -len(_BROKEN)]
        if len(whole) <= len(before) and not last:  # a special token, which a decoder may join to its neighbours
            return ""
        self._from, self._to = self._to, len(self._ids)
        return whole[len(before) :]

    def _find(self) -> bool:
        """Cuts what is held where a stop is complete: the first to end, and of those the longest."""
        ends = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if ends:
            end, start = min(ends)
            self._held, self.stopped = self._held[: end if self._keep_stop else start], True
        return self.stopped

    def _begun(self) -> int:
        """How many characters at the end may be the beginning of a stop."""
        longest = min(len(self._held), max(map(len, self._stop), default=1) - 1)
        for size in range(longest, 0, -1):
            end = self._held[-size:]
            if any(len(stop) > size and stop.startswith(end) for stop in self._stop):
                return size
        return 0

    def _give(self, size: int) -> str:
        piece, self._held = self._held[:size], self._held[size:]
        self._said.append(piece)
        return piece


def reader_of(tokenizer: Any, where: str) -> Reader | None:
    """What decodes: of a tokenizer of transformers the one inside, which leaves the spaces of a text alone.

    Raises:
        UsageError: it decodes nothing.
    """
    found = getattr(tokenizer, "backend_tokenizer", None) or tokenizer
    if found is not None and not callable(getattr(found, "decode", None)):
        allowed, fix = "have decode(ids)", "pass tokenizers.Tokenizer.from_file('tokenizer.json'), or AutoTokenizer's"
        raise UsageError(word("tokenizer", got=f"a {type(found).__name__}", allowed=allowed, where=where, fix=fix))
    return found


def stops_of(stop: str | Sequence[str] | None, reader: Reader | None, where: str) -> tuple[str, ...]:
    """The texts to stop at.

    Raises:
        UsageError: an empty one, something else than text, or no tokenizer to find them with.
    """
    stops = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if wrong := [one for one in stops if not isinstance(one, str) or not one]:
        allowed, fix = "be texts of at least one character", "leave it out"
        raise UsageError(word("stop", got=wrong[0], allowed=allowed, where=where, fix=fix))
    if stops and reader is None:
        allowed, fix = "come with the tokenizer whose text they are looked for in", "pass tokenizer=... as well"
        raise UsageError(word("stop", got="no tokenizer", allowed=allowed, where=where, fix=fix))
    return stops


def _special(reader: Reader, text: str) -> int | None:
    """The token that is this text and that decoding leaves out; None for plain text."""
    for name in ("token_to_id", "convert_tokens_to_ids"):
        find = getattr(reader, name, None)
        number = find(text) if callable(find) else None
        if isinstance(number, int):
            said = reader.decode([number], skip_special_tokens=False)
            hidden = not reader.decode([number], skip_special_tokens=True)
            return number if hidden and said.strip() == text.strip() else None
    return None
