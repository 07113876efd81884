"""The texts of all domains with their hashes, read again at each stage, and the survey that decides which are taken."""

import dataclasses
import hashlib
import heapq
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import tokenizers

from turnout.errors import DataError, UsageError, nearest, word
from turnout.train.data import rows
from turnout.train.data.display import Display
from turnout.train.data.document import Document, NotTextError
from turnout.train.data.documents import Source, list_files, listed, read_documents
from turnout.train.data.shards import FORMAT

__all__ = ["Reader", "Settings", "Survey", "Text"]

_WHERE = "turnout.train.data.prepare"
_HELD_BYTES = 1 << 20  # a text up to this size is kept while it is hashed; a longer one is read twice
_FULL = 1 << 64


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``prepare`` was asked for; see there.

    Source: none; plain configuration.
    """

    vocab_size: int | None
    held_out: float
    limit_bytes: int | None
    part_bytes: int | None
    field: str
    sample_bytes: int
    bad: Literal["refuse", "skip"] = "refuse"

    def __post_init__(self) -> None:
        if not 0 <= self.held_out <= 1:
            raise self._error("held_out", "be a share in [0, 1]", 0.05)
        if self.bad not in ("refuse", "skip"):
            raise nearest(str(self.bad), ("refuse", "skip"), kind="bad=", where=_WHERE)
        for name, least in (("limit_bytes", 1), ("part_bytes", 256), ("sample_bytes", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise self._error(name, f"be {least} or more", least)

    def _error(self, name: str, allowed: str, instead: object) -> UsageError:
        fix = f"pass {name}={instead}"
        return UsageError(word(name, got=getattr(self, name), allowed=allowed, where=_WHERE, fix=fix))

    def to_json_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values; ``bad`` only where rows are skipped: older tokens stay the same."""
        values = dataclasses.asdict(self)
        return values if self.bad == "skip" else {name: value for name, value in values.items() if name != "bad"}


@dataclasses.dataclass(frozen=True, eq=False)
class Text:
    """One document on its way.

    Args:
        domain: the index of its domain.
        digest: the SHA-256 of all its bytes.
        size: its bytes.
        pieces: its bytes, in pieces; to go through once.
        name: what messages call it.

    Source: none; plain bookkeeping.
    """

    domain: int
    digest: bytes
    size: int
    pieces: Iterable[bytes]
    name: str = "a text"

    # Different bytes of the hash decide about different things, so that no decision leans on another.
    @property
    def side_key(self) -> int:
        """Decides between train and held out."""
        return int.from_bytes(self.digest[:8], "big")

    @property
    def limit_key(self) -> int:
        """Decides what is taken under a limit: the lowest first."""
        return int.from_bytes(self.digest[8:16], "big")

    def side(self, held_out: float) -> bool:
        """Whether it is held out; also the index of its side."""
        return self.side_key < held_out * _FULL


@dataclasses.dataclass
class Survey:
    """What was found: enough to choose the same texts again without having kept them.

    Source: none; plain bookkeeping.
    """

    seen_bytes: int = 0
    chosen: int = 0
    chosen_bytes: int = 0
    # Per domain: the highest limit_key that is taken, and how many bytes of that text.
    last: list[tuple[int, int | None]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)


class Reader:
    """Goes through the texts of all domains, always in the same order.

    Args:
        domains: name -> source.
        settings: what to take.

    Source: none; plain bookkeeping.
    """

    def __init__(self, domains: Mapping[str, Source], settings: Settings) -> None:
        if (
            not isinstance(domains, Mapping)
            or not domains
            or not all(isinstance(name, str) and name for name in domains)
        ):
            raise UsageError(
                word(
                    "domains",
                    got=domains,
                    allowed="map at least one name to a source",
                    where=_WHERE,
                    fix="pass {'text': 'my_folder'}",
                )
            )
        self.settings = settings
        self.names = list(domains)
        self._parts = [list(_flat(source)) for source in domains.values()]
        self.seen_bytes = 0
        self._skipped: dict[str, list[str]] = {}

    def folders(self) -> list[Path]:
        """The source folders."""
        paths = [Path(p) for parts in self._parts for p in parts if isinstance(p, str | Path)]
        return [path for path in paths if path.is_dir()]

    def fingerprint(self, tokenizer: tokenizers.Tokenizer | None) -> str:
        """A SHA-256 that changes with the settings, the tokenizer, and any file's path, size or time.

        Raises:
            UsageError: a path that does not exist.
        """
        sources = [[name, [_mark(part) for part in parts]] for name, parts in zip(self.names, self._parts, strict=True)]
        given = None if tokenizer is None else hashlib.sha256(tokenizer.to_str().encode()).hexdigest()
        whole = [FORMAT, self.settings.to_json_dict(), given, sources]
        return hashlib.sha256(json.dumps(whole).encode()).hexdigest()

    # ---- going through

    def _texts(self, tell: Callable[[int], object] = lambda seen: None) -> Iterator[Text]:
        """All texts; those that are empty, or found in a folder and not text, are left out and remembered."""
        self.seen_bytes, self._skipped, self._tell = 0, {}, tell
        left_out = self._leave_out if self.settings.bad == "skip" else None
        for domain, parts in enumerate(self._parts):
            for part in parts:
                for document in read_documents(part, field=self.settings.field, left_out=left_out):
                    yield from self._read(document, domain)

    def _leave_out(self, reason: str, name: str) -> None:
        self._skipped.setdefault(reason, []).append(name)

    def _read(self, document: Document, domain: int) -> Iterator[Text]:
        try:
            for part in self._cut(document):
                if (text := self._hash(part, domain)).size:
                    yield text
                else:
                    self._leave_out("empty or null texts", document.name)
        except NotTextError:
            if not document.optional and self.settings.bad != "skip":
                raise
            packed = "packed files, which are not unpacked here"
            self._leave_out(packed if document.packed else "files that are not UTF-8 text", document.name)

    def _hash(self, document: Document, domain: int) -> Text:
        """The text with its hash; a short one keeps its pieces, a long one will be read again."""
        total, size, held = hashlib.sha256(), 0, []
        for piece in document.pieces():
            total.update(piece)
            size += len(piece)
            if size <= _HELD_BYTES:
                held.append(piece)
            self.seen_bytes += len(piece)
            self._tell(self.seen_bytes)
        return Text(domain, total.digest(), size, held if size <= _HELD_BYTES else document.pieces(), document.name)

    def _cut(self, document: Document) -> Iterator[Document]:
        """The document, or its parts of about ``part_bytes``."""
        wanted = self.settings.part_bytes
        if wanted is None:
            yield document
            return
        held, size, count = [], 0, 0
        for piece in document.pieces(min(wanted, 1 << 16)):
            held.append(piece)
            size += len(piece)
            if size + len(piece) / 2 > wanted:
                yield dataclasses.replace(document, name=f"{document.name}, part {count}", content=b"".join(held))
                held, size, count = [], 0, count + 1
        if held or not count:
            yield dataclasses.replace(document, name=f"{document.name}, part {count}", content=b"".join(held))

    def survey(self, tell: Display) -> Survey:
        """Reads everything once.

        Raises:
            DataError: a domain without text, or a side without documents.
        """
        survey = Survey()
        total = sum(_size(part) for parts in self._parts for part in parts)
        tallies = [_Tally(self.settings.held_out, self.settings.limit_bytes) for _ in self.names]
        for text in self._texts(lambda seen: tell("reading", seen, total)):
            tallies[text.domain].add(text)
        survey.seen_bytes = self.seen_bytes
        for reason, names in self._skipped.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            survey.notes.append(f"left out {len(names)} {reason}: {', '.join(names[:3])}{more}")
        for name, tally in zip(self.names, tallies, strict=True):
            if not tally.documents:
                problem = "; ".join(survey.notes) or "nothing"
                fix = "name a file or folder with text, or leave the domain out"
                raise DataError(word(f"the domain {name!r}", got=problem, allowed="hold text", where=_WHERE, fix=fix))
            survey.last.append(tally.close())
        self._check_sides(survey, tallies)
        survey.chosen = sum(tally.documents for tally in tallies)
        survey.chosen_bytes = sum(tally.bytes for tally in tallies)
        return survey

    def _check_sides(self, survey: Survey, tallies: "list[_Tally]") -> None:
        share = self.settings.held_out
        if not 0 < share < 1:
            return
        documents, held = sum(tally.documents for tally in tallies), sum(tally.held for tally in tallies)
        if held in (0, documents):
            raise _empty_side(
                share, documents, bool(held), min(t.lowest for t in tallies), max(t.highest for t in tallies)
            )
        for name, tally in zip(self.names, tallies, strict=True):
            if tally.held in (0, tally.documents):
                side, only = "trained on" if tally.held else "held out", tally.documents
                survey.notes.append(f"no document of the domain {name!r} is {side}: it has only {only}")

    def chosen(self, survey: Survey, stage: str, tell: Display) -> Iterator[Text]:
        """The texts that the survey takes, each once."""
        done = 0

        def told(pieces: Iterable[bytes]) -> Iterator[bytes]:
            nonlocal done
            for piece in pieces:
                yield piece
                done += len(piece)
                tell(stage, done, survey.chosen_bytes)

        for text in self._texts():
            highest, rest = survey.last[text.domain]
            if text.limit_key < highest or (text.limit_key == highest and (rest is None or text.size <= rest)):
                yield dataclasses.replace(text, pieces=told(text.pieces))
            elif text.limit_key == highest and rest is not None:
                yield dataclasses.replace(text, size=rest, pieces=told(_first(text.pieces, rest)))


class _Tally:
    """Counts of one domain, over all its texts or over those with the lowest hashes that make up the limit."""

    def __init__(self, held_out: float, limit_bytes: int | None) -> None:
        self.documents = self.bytes = self.held = 0
        self.lowest, self.highest = _FULL, -1  # of the side keys
        self._held_out, self._limit = held_out, limit_bytes
        self._kept: dict[int, list[Text]] = {}
        self._heap: list[int] = []

    def add(self, text: Text) -> None:
        """Counts a text; under a limit, forgets those that are no longer needed to fill it."""
        if self._limit is None:
            self._count(text)
            return
        self.documents, self.bytes = self.documents + 1, self.bytes + text.size
        if text.limit_key not in self._kept:
            heapq.heappush(self._heap, -text.limit_key)
        # Copies of a text are taken or left together.
        self._kept.setdefault(text.limit_key, []).append(dataclasses.replace(text, pieces=()))
        while self.bytes - (size := sum(text.size for text in self._kept[-self._heap[0]])) >= self._limit:
            self.bytes -= size
            self.documents -= len(self._kept.pop(-heapq.heappop(self._heap)))

    def close(self) -> tuple[int, int | None]:
        """The highest key that is taken, and how many bytes of that text; None for all."""
        if self._limit is None:
            return _FULL, None
        last = -self._heap[0]
        below = self.bytes - sum(text.size for text in self._kept[last])
        rest = self._limit - below
        texts = [t if t.limit_key < last else dataclasses.replace(t, size=min(t.size, rest)) for t in self._all()]
        self.documents = self.bytes = 0
        for text in texts:
            self._count(text)
        return last, rest

    def _all(self) -> list[Text]:
        return [text for texts in self._kept.values() for text in texts]

    def _count(self, text: Text) -> None:
        self.documents, self.bytes = self.documents + 1, self.bytes + text.size
        self.held += text.side(self._held_out)
        self.lowest, self.highest = min(self.lowest, text.side_key), max(self.highest, text.side_key)


def _empty_side(share: float, documents: int, all_held: bool, lowest: int, highest: int) -> DataError:
    """The error when every document falls on one side, with the nearest share that would part them."""
    # The share that just takes in the lowest document, or just leaves out the highest.
    fits = math.floor(highest / _FULL * 1e4) / 1e4 if all_held else math.ceil((lowest + 1) / _FULL * 1e4) / 1e4
    parts = "cut long documents into parts with part_bytes=16384"
    useful = lowest < highest and 0 < fits < 1 and (all_held or fits <= 0.5)
    side = "held out" if all_held else "trained on"
    return DataError(
        word(
            "held_out",
            got=f"{share}, with which all {documents} documents are {side}"
            if documents > 1
            else f"{share} of 1 document",
            allowed="leave documents on both sides",
            where=_WHERE,
            fix=f"pass held_out={fits}, or {parts}" if useful else f"{parts}, or give more documents",
        )
    )


def _first(pieces: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The first ``size`` bytes, less those of a character that would be cut."""
    for piece in pieces:
        if len(piece) >= size:
            yield piece[:size].decode(errors="ignore").encode()
            return
        size -= len(piece)
        yield piece


def _flat(source: Source) -> Iterator[Any]:
    """The sources in a list of lists of them; an ``hf:`` name as the data set it names."""
    if isinstance(source, str) and source.startswith("hf:"):
        yield rows.load(source)
    elif isinstance(source, str | Path | Document) or rows.is_data_set(source):
        yield source
    else:
        for part in listed(source):
            yield from _flat(part)


def _mark(part: Any) -> Any:
    """What changes when a source does, as JSON values."""
    if isinstance(part, str | Path):
        return [_file_mark(path) for path, _ in list_files(part)]
    if isinstance(part, Document):
        content = part.content.encode(errors="replace") if isinstance(part.content, str) else part.content
        return [part.name, _file_mark(content) if isinstance(content, Path) else hashlib.sha256(content).hexdigest()]
    return getattr(part, "_fingerprint", None)


def _file_mark(path: Path) -> list[Any]:
    found = path.stat()
    return [str(path.resolve()), found.st_size, found.st_mtime_ns]


def _size(part: Any) -> int:
    """About how many bytes will be read; 0 for a data set, which does not say."""
    if isinstance(part, str | Path):
        return sum(path.stat().st_size for path, _ in list_files(part))
    if isinstance(part, Document):
        return part.content.stat().st_size if isinstance(part.content, Path) else len(part.content)
    return 0
