"""From sources to a TokenSet: survey them, train a tokenizer on a sample, tokenise piece by piece onto the disk."""

import contextlib
import hashlib
import heapq
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import tokenizers

from turnout.errors import CheckpointError, DataError, TurnoutError, UsageError, word
from turnout.storage import digest, hold, open_own, read_error, sealed, write_whole
from turnout.train.data.display import Display, display
from turnout.train.data.documents import Source
from turnout.train.data.reader import Reader, Settings, Survey
from turnout.train.data.shards import COLUMNS, FORMAT, SIDES, SideWriter, TokenSet
from turnout.train.data.spaced import spaced
from turnout.train.data.tokenizer import (
    byte_lengths,
    check_text,
    check_tokenizer,
    encode,
    load_tokenizer,
    opening_ids,
    own_opening,
    train_tokenizer,
)

__all__ = ["prepare"]

_WHERE = "turnout.train.data.prepare"
_VOCAB_SIZE = 4096
_BATCH_BYTES = 4 << 20  # text given to the tokenizer at once
_FILES = {"tokens.json", "tokenizer.json", ".lock"}


def prepare(
    domains: Mapping[str, Source],
    out: str | Path,
    *,
    vocab_size: int | None = None,
    tokenizer: str | Path | None = None,
    held_out: float = 0.05,
    limit_bytes: int | None = None,
    part_bytes: int | None = None,
    field: str = "text",
    sample_bytes: int = 4_000_000,
    bad: Literal["refuse", "skip"] = "refuse",
    progress: Any = None,
    quiet: bool = False,
) -> TokenSet:
    """Text into tokens on disk, trained and held-out documents apart; what is already there is used again.

    A document with SHA-256 h is held out when h[0:8] / 2^64 < held_out, so copies of a text never lie on both sides.
    Its tokens follow the tokenizer's own BOS, or else a separator. The tokenizer learns from trained documents only.
    Nothing is read again when ``out`` was prepared from the same files (paths, sizes, times) with the same settings.

    Args:
        domains: name -> source; see ``read_documents`` for what a source may be.
        out: a new folder, or one that was prepared before; outside the sources.
        vocab_size: V of the tokenizer to train, default 4096; with ``tokenizer`` the most it may have.
        tokenizer: a ``tokenizer.json`` to use instead of training one.
        held_out: share of the documents to hold out, in [0, 1]; with 1 the tokenizer learns from them.
        limit_bytes: at most this much text of each domain, documents chosen by content hash and the last one cut.
        part_bytes: cut documents into parts of about this size, each a document with its own hash: to hold out part
            of a single long file.
        field: the field of jsonl, parquet and data set rows that holds the text.
        sample_bytes: how much text the tokenizer is trained on.
        bad: what to do with a row that cannot be read (broken JSON, no text in its field, half a surrogate pair) and
            with a named file that is not UTF-8: "refuse" the source, or "skip" it; notes count what was skipped.
        progress: called with (stage, bytes done, bytes in all), in place of a bar or lines on stderr; its method
            ``say(text)``, if it has one, gets the notes.
        quiet: say nothing; notes are still in ``TokenSet.notes``.

    Returns:
        The tokens, opened.

    Raises:
        UsageError: a setting out of range, a path that does not exist, a folder that holds something else.
        DataError: no text, text that is not UTF-8, too little of it; says where.
        StorageError: a folder without permission, a full disk.
        MissingExtraError: parquet or data sets without the library that reads them.

    >>> import tempfile
    >>> from turnout.train.data import Document
    >>> texts = [Document(str(n), f"text number {n}, and so on") for n in range(20)]
    >>> tokens = prepare({"notes": texts}, tempfile.mkdtemp(), vocab_size=260, held_out=0.3, quiet=True)
    >>> print(tokens)
    TokenSet(316 train tokens in 14 documents, 134 held out tokens in 6 documents; 1 domain: notes; vocabulary 260)

    Source: none; the content hash follows the habit of Kiela et al., 2021, "Dynabench", of splits that data decides.
    """
    settings = Settings(vocab_size, held_out, limit_bytes, part_bytes, field, sample_bytes, bad)
    with display(progress, quiet=quiet) as tell:
        return _prepare(domains, Path(out), tokenizer, settings, tell)


def _prepare(
    domains: Mapping[str, Source], out: Path, tokenizer: str | Path | None, settings: Settings, tell: Display
) -> TokenSet:
    try:
        loaded = None if tokenizer is None else load_tokenizer(tokenizer)
        if loaded is not None:
            check_tokenizer(loaded, vocab_size=settings.vocab_size)
        reader = Reader(domains, settings)
        _check_folder(out, reader)
        fingerprint = reader.fingerprint(loaded)
        if loaded is not None:
            fingerprint = _opened(_checked(fingerprint), loaded)
        if found := _found(out, fingerprint):
            return found
        with _locked(out, tell):
            # Another process may have prepared it meanwhile.
            return _found(out, fingerprint, tell) or _build(reader, loaded, out, fingerprint, tell)
    except OSError as error:
        if isinstance(error, TurnoutError):
            raise
        raise read_error(error, error.filename or out, _WHERE) from error


def _checked(fingerprint: str) -> str:
    """Another fingerprint than before every text was checked: what was prepared then is prepared again."""
    return hashlib.sha256(f"{fingerprint}, each text checked".encode()).hexdigest()


def _opened(fingerprint: str, tokenizer: tokenizers.Tokenizer) -> str:
    """Another one where documents are opened by the tokenizer's own token: the separator always did before."""
    own = own_opening(tokenizer)
    return hashlib.sha256(f"{fingerprint}, opened by {own}".encode()).hexdigest() if own else fingerprint


def _check_folder(out: Path, reader: Reader) -> None:
    """The folder is ours to write in, and not among what is read."""
    inside = next((folder for folder in reader.folders() if out.resolve().is_relative_to(folder.resolve())), None)
    if inside is not None:
        raise UsageError(
            word(
                "the folder for tokens",
                got=f"{out}, inside the source {inside}",
                allowed="lie outside the sources, or it would be read as text",
                where=_WHERE,
                fix=f"write beside it, to {inside.resolve().with_name(inside.resolve().name + '-tokens')}",
            )
        )
    if out.exists() and not out.is_dir():
        raise UsageError(
            word("the folder for tokens", got=f"{out}, a file", allowed="be a folder", where=_WHERE, fix="rename it")
        )
    strange = _strange(out)
    if strange:
        raise UsageError(
            word(
                "the folder for tokens",
                got=f"{out}, which holds {', '.join(strange[:3])}",
                allowed="be new, empty, or one that was prepared before",
                where=_WHERE,
                fix=f"write to {out / 'tokens'}",
            )
        )


def _strange(out: Path) -> list[str]:
    """What is in the folder that no preparation left there."""
    if not out.exists():
        return []
    found = [path for path in out.iterdir() if path.name.removesuffix(".part") not in {*_FILES, *SIDES}]
    for side in SIDES:
        folder = out / side
        inside = folder.iterdir() if folder.is_dir() else [folder] if folder.exists() else []
        found += [path for path in inside if path.name not in COLUMNS]
    return sorted(path.relative_to(out).as_posix() for path in found)


@contextlib.contextmanager
def _locked(out: Path, tell: Display) -> Iterator[None]:
    """Holds the folder; a second process waits, then finds what the first one made. A refusal leaves no new folder."""
    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with open_own(out / ".lock") as file:
        if not hold(file):
            tell.say(f"waiting for another process that prepares {out}")
            hold(file, wait=True)
        try:
            yield
        except TurnoutError:
            if new and [path.name for path in out.iterdir()] == [".lock"]:
                with contextlib.suppress(OSError):  # some systems keep what is open
                    (out / ".lock").unlink()
                    out.rmdir()
            raise


def _found(out: Path, fingerprint: str, tell: Display | None = None) -> TokenSet | None:
    """What is in the folder, when it was made from the same sources and settings and is whole."""
    if not (out / "tokens.json").exists():
        return None
    try:
        found = TokenSet.open(out)
    except CheckpointError as error:
        if tell is not None:
            tell.say(f"preparing {out} again: {error}")
        return None
    if found.head.get("fingerprint") == fingerprint:
        return found
    if tell is not None:
        tell.say(f"the sources or settings of {out} have changed: preparing it again")
    return None


def _build(
    reader: Reader, tokenizer: tokenizers.Tokenizer | None, out: Path, fingerprint: str, tell: Display
) -> TokenSet:
    survey = reader.survey(tell)
    for note in survey.notes:
        tell.say(note)
    if tokenizer is None:
        tokenizer = _train(reader, survey, tell)
    # From here to the last line the folder is not a token set, whatever happens.
    (out / "tokens.json").unlink(missing_ok=True)
    write_whole(out / "tokenizer.json", tokenizer.to_str(pretty=True))
    vocab_size = len(byte_lengths(tokenizer))
    writers = [SideWriter(out, side, vocab_size) for side in SIDES]
    try:
        held_out = _tokenise(reader, survey, tokenizer, writers, tell)
        files = writers[0].finish() | writers[1].finish()
    finally:
        for writer in writers:
            writer.close()
    path = out / "tokenizer.json"
    files["tokenizer.json"] = {"bytes": path.stat().st_size, "sha256": digest(path)}
    head = {
        "format": FORMAT,
        "domains": reader.names,
        "vocab_size": vocab_size,
        "separator_id": opening_ids(tokenizer)[0],
        "settings": reader.settings.to_json_dict(),
        "splits": {
            side: {
                "tokens": writer.num_tokens,
                "documents": writer.num_documents,
                "tokens_by_domain": {reader.names[d]: n for d, n in sorted(writer.tokens_by_domain.items())},
            }
            for side, writer in zip(SIDES, writers, strict=True)
        },
        "held_out_text": held_out,
        "notes": survey.notes,
        "fingerprint": fingerprint,
        "files": files,
    }
    write_whole(out / "tokens.json", json.dumps(sealed(head), indent=2) + "\n")
    tokens = TokenSet.open(out, verify=False)
    tell.say(f"prepared {tokens} in {out}")
    return tokens


def _train(reader: Reader, survey: Survey, tell: Display) -> tokenizers.Tokenizer:
    """A tokenizer trained on the pieces of trained documents with the lowest hashes, up to the size of the sample."""
    kept: list[tuple[int, bytes]] = []
    size = 0
    for text in reader.chosen(survey, "sampling", tell):
        if text.side(reader.settings.held_out) and reader.settings.held_out < 1:
            continue
        for number, piece in enumerate(text.pieces):
            key = hashlib.sha256(text.digest + number.to_bytes(8, "little")).digest()
            heapq.heappush(kept, (-int.from_bytes(key[:8], "little"), piece))
            size += len(piece)
            while len(kept) > 1 and size - len(kept[0][1]) >= reader.settings.sample_bytes:
                size -= len(heapq.heappop(kept)[1])
    tell("training the tokenizer", 0, size)
    vocab_size = reader.settings.vocab_size or _VOCAB_SIZE
    tokenizer = train_tokenizer((piece.decode() for _, piece in sorted(kept)), vocab_size=vocab_size)
    tell("training the tokenizer", size, size)
    return tokenizer


def _tokenise(
    reader: Reader, survey: Survey, tokenizer: tokenizers.Tokenizer, writers: list[SideWriter], tell: Display
) -> str:
    """Every chosen text through the tokenizer, a few megabytes at a time; the digest of what is held out.

    That is the sum of a hash for each held-out document: the same whatever the tokenizer and the order of files.
    """
    opening, held_out = opening_ids(tokenizer), reader.settings.held_out
    length_V, table = byte_lengths(tokenizer), spaced(tokenizer)
    texts: list[str] = []
    # Where each text goes, the domain when it begins a document, and the document's name.
    marks: list[tuple[SideWriter, int | None, str]] = []
    size = 0

    def flush() -> None:
        within = [domain is None for _, domain, _ in marks]
        found = encode(tokenizer, texts) if table is None else table.encode(texts, within)
        for text, ids, (writer, domain, name) in zip(texts, found, marks, strict=True):
            if table is None:
                check_text(tokenizer, length_V, text, ids, name)
            else:
                table.check(text, ids, name, within=domain is None)
            if domain is not None:
                writer.begin(domain, opening[0])
                writer.add(opening[1:])
            writer.add(ids)
        texts.clear()
        marks.clear()

    documents = held = 0
    for text in reader.chosen(survey, "tokenising", tell):
        if text.side(held_out):
            mark = f"{reader.names[text.domain]}\0{text.size}\0".encode() + text.digest
            held += int.from_bytes(hashlib.sha256(mark).digest(), "big")
        writer = writers[text.side(held_out)]
        for piece, domain in zip(text.pieces, itertools.chain([text.domain], itertools.repeat(None)), strict=False):
            texts.append(piece.decode())
            marks.append((writer, domain, text.name))
            size += len(piece)
            if size >= _BATCH_BYTES:
                flush()
                size = 0
        documents += 1
    flush()
    now, then = (documents, reader.seen_bytes), (survey.chosen, survey.seen_bytes)
    if now != then:
        raise DataError(
            word(
                "the sources",
                got=f"{now[0]} documents of {now[1]:,} bytes, after {then[0]} of {then[1]:,}",
                allowed="stay as they are while they are prepared",
                where=_WHERE,
                fix="prepare them again when nothing writes to them",
            )
        )
    return f"{held % (1 << 256):064x}"
