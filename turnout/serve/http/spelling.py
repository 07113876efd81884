"""What a token stands for: its bytes, and a text by which it is told apart from others."""

import functools

from tokenizers import Tokenizer

from turnout.train.data.spaced import spaced

__all__ = ["Spelling"]


class Spelling:
    """Tokens as bytes and as texts, for log-probabilities.

    Args:
        tokenizer: whose tokens they are.

    >>> from turnout.train.data import train_tokenizer
    >>> spelling = Spelling(train_tokenizer(["a cat, a cat"], vocab_size=258))
    >>> spelling.bytes_of(0), spelling.text(0), spelling.text(257)
    (b'<|endoftext|>', '<|endoftext|>', 'at')

    Source: the ``token`` and ``bytes`` of OpenAI's log-probabilities.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.get_added_tokens_decoder().items()}
        table = spaced(tokenizer)
        self._spelt = None if table is None else table.bytes_V
        decoder = tokenizer.decoder
        self._by_letters = decoder is not None and b"ByteLevel" in decoder.__getstate__()

    def bytes_of(self, token: int) -> bytes:
        """The bytes of a token, in a text; of a special one, those of its name."""
        if token in self._added:
            return self._added[token].encode()
        if self._spelt is not None:
            return self._spelt[token] if token < len(self._spelt) else b""
        name = self._tokenizer.id_to_token(token)
        if name is None:  # a model may have more tokens than its tokenizer
            return b""
        letters = _letters()
        if self._by_letters and all(letter in letters for letter in name):
            return bytes(letters[letter] for letter in name)
        return self._tokenizer.decode([token], skip_special_tokens=False).encode()

    def text(self, token: int) -> str:
        r"""The token as a text of its own; bytes that are no character are written as ``bytes:\xe2\x82``."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


@functools.cache
def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level tokenizer stands for."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + place): byte for place, byte in enumerate(others)}
