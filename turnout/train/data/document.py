"""One document: a text in memory or in a file of any size, read in pieces at places where words begin."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from turnout.errors import DataError, word
from turnout.reading import open_regular
from turnout.storage import read_error

__all__ = ["Document", "NotTextError"]

PIECE = 1 << 16
_BOM = b"\xef\xbb\xbf"
_WHERE = "turnout.train.data"
PACKED = {".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".tgz", ".7z"}


class NotTextError(DataError):
    """A file that is not UTF-8 text."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text: in memory, or in a file of any size that is only ever read in pieces.

    Args:
        name: where it comes from, for messages: a path, ``path:line``, a topic.
        content: the text, its UTF-8 bytes, or the path of a UTF-8 file.
        optional: it was found in a folder, not named by the user; when it is not text it is skipped with a note.

    >>> [len(piece) for piece in Document("note", "all of " * 20_000).pieces()]
    [65533, 65534, 8933]
    >>> b"".join(Document("note", "été").pieces()).decode()
    'été'

    Source: none; plain bookkeeping.
    """

    name: str
    content: str | bytes | Path
    optional: bool = False

    def pieces(self, size: int = PIECE) -> Iterator[bytes]:
        """The UTF-8 bytes in pieces of at most ``size`` (4 or more), each valid; a BOM at the start is left out.

        A piece ends before a space that follows a printable ASCII character, where byte-level BPE begins a new
        word anyway, so that the tokens of the pieces are those of the whole. Where a piece has no such place it
        ends at white space or, at worst, between two characters, and the tokens at that seam may differ.

        Raises:
            NotTextError: NUL bytes or invalid UTF-8.
            StorageError: the file cannot be read.
        """
        done, lines = 0, 1
        for piece in self._cut(size):
            try:
                piece.decode()
            except UnicodeDecodeError as error:
                line = lines + piece.count(b"\n", 0, error.start)
                place = f", in line {line}" if line > 1 else ""
                raise self._not_text(f"byte {done + error.start} is not UTF-8{place}") from error
            if isinstance(self.content, Path) and b"\0" in piece:
                raise self._not_text(f"a NUL byte at {done + piece.index(0)}")
            done += len(piece)
            lines += piece.count(b"\n")
            yield piece

    def _cut(self, size: int) -> Iterator[bytes]:
        rest, first = b"", True
        for block in self._blocks():
            rest += block
            if first and len(rest) >= len(_BOM):
                rest, first = rest.removeprefix(_BOM), False
            start = 0
            while len(rest) - start > size:
                at = _seam(rest, start, start + size)
                yield rest[start:at]
                start = at
            rest = rest[start:]
        if rest:
            yield rest

    def _blocks(self) -> Iterator[bytes]:
        if isinstance(self.content, Path):
            try:
                with open_regular(self.content, refuse=self._not_text, any_link=True) as file:
                    while block := file.read(PIECE):
                        yield block
            except OSError as error:
                raise read_error(error, self.content, _WHERE) from error
            return
        content = self.content
        if isinstance(content, str):
            try:
                content = content.encode()
            except UnicodeEncodeError as error:
                problem = f"half a surrogate pair at character {error.start}"
                raise self._not_text(problem, "repair the text, or leave it out") from error
        for start in range(0, len(content), PIECE):
            yield content[start : start + PIECE]

    @property
    def packed(self) -> bool:
        """Whether its name is that of a packed file, which is not unpacked here."""
        return Path(self.name).suffix.lower() in PACKED

    def _not_text(self, problem: str, fix: str = "convert it to UTF-8 text, or leave it out") -> NotTextError:
        fix = "unpack it first" if self.packed else fix
        return NotTextError(
            word("the data", got=f"{self.name} ({problem})", allowed="be UTF-8 text", where=_WHERE, fix=fix)
        )


def _seam(rest: bytes, start: int, stop: int) -> int:
    """Where to cut: after ``start``, at ``stop`` at the latest, at the best place the last of its kind."""
    at = rest.rfind(b" ", start + 1, stop + 1)
    while at > 0:
        if 0x21 <= rest[at - 1] <= 0x7E:
            return at
        at = rest.rfind(b" ", start + 1, at)
    at = max(rest.rfind(b" ", start + 1, stop + 1), rest.rfind(b"\n", start + 1, stop + 1))
    if at > 0:
        return at
    at = stop
    while at > stop - 3 and rest[at] & 0xC0 == 0x80:  # inside a character, which has four bytes at most
        at -= 1
    return at
