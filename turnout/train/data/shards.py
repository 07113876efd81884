"""Tokens on disk: flat memory-mapped columns of two sides, train and held out, with their tokenizer."""

import dataclasses
import functools
import hashlib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

import numpy as np
from tokenizers import Tokenizer

from turnout.errors import CheckpointError, word
from turnout.reading import check_fields, check_link, read_json
from turnout.storage import check_seal, digest, read_error
from turnout.train.data.tokenizer import byte_lengths, load_tokenizer

__all__ = ["COLUMNS", "FORMAT", "SIDES", "SideWriter", "Split", "TokenSet"]

FORMAT = "turnout.tokens/1"
SIDES = ("train", "held_out")
COLUMNS = ("token.bin", "document.bin", "domain.bin")
_OFFSET, _DOMAIN = "<i8", "<u2"
_TOLD_BYTES, _SCAN = 4_000_000_000, 1 << 24
_FILES = {"tokenizer.json", *(f"{side}/{column}" for side in SIDES for column in COLUMNS)}
_HEAD = {
    "files": dict[str, dict],
    "domains": list[str],
    "vocab_size": int,
    "separator_id": int,
    "notes": list[str],
}


def token_dtype(vocab_size: int) -> str:
    """The smallest of uint16 and uint32 that holds every token.

    >>> token_dtype(65_536), token_dtype(65_537)
    ('<u2', '<u4')

    Source: none; plain bookkeeping.
    """
    return "<u2" if vocab_size <= 65_536 else "<u4"


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """One side of the text: all its tokens in one row, and where each document begins.

    Every document begins with the token that opens it, the separator or the tokenizer's own BOS, so each of its own
    tokens has something to be predicted from.

    Args:
        name: "train" or "held_out".
        token_T: (T,) uint16 or uint32, memory-mapped and read-only.
        document_N: (N + 1,) int64, the first token of each document, and T at the end.
        domain_N: (N,) uint16, the domain of each document.

    >>> Split("train", np.array([0, 7, 0], "<u2"), np.array([0, 2, 3]), np.array([0, 0])).num_documents
    2

    Source: none; the flat token file of nanoGPT (Karpathy, 2022), with documents and domains beside it.
    """

    name: str
    token_T: np.ndarray
    document_N: np.ndarray
    domain_N: np.ndarray

    @property
    def num_tokens(self) -> int:
        """T, separators included."""
        return len(self.token_T)

    @property
    def num_documents(self) -> int:
        """N."""
        return len(self.domain_N)


@dataclasses.dataclass(frozen=True, eq=False)
class TokenSet:
    """A folder of prepared text: two sides of tokens, the tokenizer that made them, and where they come from.

    On disk: ``tokenizer.json``; for each side a folder ``train`` and ``held_out`` with the flat little-endian columns
    ``token.bin``, ``document.bin`` and ``domain.bin``; and ``tokens.json``, written last, with the size and SHA-256
    of every file, so that a half-written folder never passes for a finished one.

    Args:
        path: the folder.
        train: what is learned from.
        held_out: what is only measured on.
        domains: the names that ``domain_N`` points to.
        vocab_size: V.
        separator_id: the token at the start of every document: the separator, or the tokenizer's own BOS.
        digest: a SHA-256 over the contents of all files and the domains; the same text and settings give the same.
        notes: what was left out of the sources, and why.
        head: all of tokens.json.

    >>> import tempfile
    >>> from turnout.train.data import Document, prepare
    >>> texts = [Document(str(n), f"text number {n}, and so on") for n in range(20)]
    >>> tokens = prepare({"notes": texts}, tempfile.mkdtemp(), vocab_size=260, held_out=0.3, quiet=True)
    >>> tokens.domains, tokens.train.num_documents + tokens.held_out.num_documents
    (('notes',), 20)

    Source: none; see Split.
    """

    path: Path
    train: Split
    held_out: Split
    domains: tuple[str, ...]
    vocab_size: int
    separator_id: int
    digest: str
    notes: tuple[str, ...]
    head: Mapping[str, Any] = dataclasses.field(repr=False)

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> Self:
        """The tokens in this folder, mapped, after every file is checked: its size, its SHA-256, and what it holds.

        Everything is read once for that, about a gigabyte a second; above 4 GB stderr says so. Nothing is remembered
        from one time to the next: bytes can change under the same size and time.

        Args:
            path: the folder.
            verify: False for who has just written it, and knows; then only sizes are checked.

        Raises:
            CheckpointError: the folder was never finished, or a file is missing, truncated, altered or of another
                version; says which.
        """
        path = Path(path)
        head = _head(path)
        try:
            for name, file in head["files"].items():
                check_link(path / name, functools.partial(_corrupt, path / name))
                found = (path / name).stat().st_size if (path / name).is_file() else None
                if found != file["bytes"]:
                    state = "missing" if found is None else f"{found} bytes long, not {file['bytes']}"
                    raise _corrupt(path / name, state)
            if verify:
                _verify(path, head)
            splits = [_map_split(path, name, head["vocab_size"]) for name in SIDES]
            if verify:
                for split in splits:
                    _check_columns(path / split.name, split, head)
            digest = content_digest(head)
            rest = (tuple(head["domains"]), head["vocab_size"], head["separator_id"], digest, tuple(head["notes"]))
        except (KeyError, TypeError, AttributeError) as error:
            raise _corrupt(path / "tokens.json", f"lacks {error}") from error
        return cls(path, splits[0], splits[1], *rest, head)

    def verify(self) -> None:
        """Reads every file again and compares its SHA-256 with the one written down, as ``open`` did.

        Raises:
            CheckpointError: a file was altered; says which.
        """
        _verify(self.path, self.head)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; it reads the names of special tokens in a text as plain text."""
        return load_tokenizer(self.path / "tokenizer.json")

    @functools.cached_property
    def byte_length_V(self) -> np.ndarray:
        """(V,) int64, the UTF-8 bytes that each token stands for; special tokens 0, or -1: see ``byte_lengths``."""
        return byte_lengths(self.tokenizer)

    def __str__(self) -> str:
        sides = ", ".join(
            f"{split.num_tokens:,} {split.name.replace('_', ' ')} tokens in {split.num_documents:,} documents"
            for split in (self.train, self.held_out)
        )
        domains = "1 domain" if len(self.domains) == 1 else f"{len(self.domains)} domains"
        return f"TokenSet({sides}; {domains}: {', '.join(self.domains)}; vocabulary {self.vocab_size:,})"


def content_digest(head: Mapping[str, Any]) -> str:
    """The SHA-256 over what a token set holds, whatever the paths and times of its sources.

    Source: none; plain bookkeeping.
    """
    content = {"domains": head["domains"], "files": {name: file["sha256"] for name, file in head["files"].items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _head(path: Path) -> dict[str, Any]:
    """What tokens.json says, every field of its type, and no file but those of a token set."""
    refuse = functools.partial(_corrupt, path / "tokens.json")
    try:
        head = read_json(path / "tokens.json", refuse=refuse)
    except FileNotFoundError as error:
        raise _corrupt(path, "no tokens.json, so its preparation never finished") from error
    except OSError as error:
        raise refuse(str(error)) from error
    if head.get("format") != FORMAT:
        raise refuse(f"not of the format {FORMAT}")
    check_fields(head, _HEAD, refuse)
    check_seal(head, refuse, (*_HEAD, "format", "settings", "splits", "fingerprint", "held_out_text"))
    if set(head["files"]) != _FILES:
        raise refuse(f"its files are {', '.join(sorted(head['files']))[:120]}")
    for name, file in head["files"].items():
        check_fields(file, {"bytes": int, "sha256": str}, functools.partial(_corrupt, path / f"tokens.json, {name}"))
    return head


def _verify(path: Path, head: Mapping[str, Any]) -> None:
    size = sum(file["bytes"] for file in head["files"].values())
    if size > _TOLD_BYTES:
        print(f"checking the SHA-256 of {size / 1e9:.0f} GB of tokens in {path}", file=sys.stderr, flush=True)
    for name, file in head["files"].items():
        try:
            found = digest(path / name)
        except OSError as error:
            raise _corrupt(path / name, str(error)) from error
        if found != file["sha256"]:
            raise _corrupt(path / name, f"SHA-256 {found[:12]}…, not {file['sha256'][:12]:.12}…")


def _check_columns(path: Path, split: Split, head: Mapping[str, Any]) -> None:
    """Refuses columns that point outside each other, whatever their hashes: whoever writes those writes these."""
    starts, domains, vocab_size = split.document_N, split.domain_N, head["vocab_size"]
    if len(domains) and (int(starts[0]) != 0 or int(np.diff(starts).min()) < 1):
        raise _corrupt(path / "document.bin", "documents that do not follow each other")
    if len(domains) and int(domains.max()) >= len(head["domains"]):
        raise _corrupt(path / "domain.bin", f"the domain {int(domains.max())} of {len(head['domains'])}")
    most = max((int(split.token_T[n : n + _SCAN].max()) for n in range(0, split.num_tokens, _SCAN)), default=0)
    if most >= vocab_size or not 0 <= head["separator_id"] < vocab_size:
        raise _corrupt(path / "token.bin", f"the token {most} of a vocabulary of {vocab_size}")


def _map_split(path: Path, name: str, vocab_size: int) -> Split:
    columns = {"token": token_dtype(vocab_size), "document": _OFFSET, "domain": _DOMAIN}
    arrays = [_map(path / name / f"{column}.bin", dtype) for column, dtype in columns.items()]
    token_T, document_N, domain_N = arrays
    if len(document_N) != len(domain_N) + 1 or int(document_N[-1]) != len(token_T):
        raise _corrupt(path / name, f"{len(token_T)} tokens, {len(document_N)} offsets, {len(domain_N)} domains")
    return Split(name, token_T, document_N, domain_N)


def _map(path: Path, dtype: str) -> np.ndarray:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _corrupt(path: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        word(
            "the tokens",
            got=f"{path} ({problem})",
            allowed=f"be a whole {FORMAT} folder",
            where="TokenSet.open",
            fix="remove the folder and prepare it again",
        )
    )


class SideWriter:
    """Appends documents to the three columns of one side; memory stays flat.

    Args:
        path: the folder of the token set.
        name: the side.
        vocab_size: V, which decides the width of a token.

    Source: none; see TokenSet.
    """

    def __init__(self, path: Path, name: str, vocab_size: int) -> None:
        self.num_tokens = self.num_documents = 0
        self.tokens_by_domain: dict[int, int] = {}
        self._domain = 0
        folder = path / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._columns = {
                "token": _Column(folder / "token.bin", token_dtype(vocab_size)),
                "document": _Column(folder / "document.bin", _OFFSET),
                "domain": _Column(folder / "domain.bin", _DOMAIN),
            }
        except OSError as error:
            raise read_error(error, folder, "turnout.train.data.prepare") from error

    def begin(self, domain: int, separator: int) -> None:
        """The next tokens are a new document's; its first is the one that opens it."""
        self._columns["document"].append([self.num_tokens])
        self._columns["domain"].append([domain])
        self.num_documents += 1
        self._domain = domain
        self.add([separator])

    def add(self, ids: Sequence[int]) -> None:
        """Tokens of the document that was begun."""
        self._columns["token"].append(ids)
        self.num_tokens += len(ids)
        self.tokens_by_domain[self._domain] = self.tokens_by_domain.get(self._domain, 0) + len(ids)

    def finish(self) -> dict[str, dict[str, object]]:
        """Flushes everything to the disk and says what is there: file -> bytes and sha256."""
        self._columns["document"].append([self.num_tokens])
        return {f"{c.path.parent.name}/{c.path.name}": c.finish() for c in self._columns.values()}

    def close(self) -> None:
        """Closes the files, finished or not."""
        for column in self._columns.values():
            column.file.close()


class _Column:
    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        path.unlink(missing_ok=True)  # whoever has mapped the old one keeps it
        self.file: IO[bytes] = path.open("wb")
        self.bytes, self.sum = 0, hashlib.sha256()

    def append(self, values: Sequence[int]) -> None:
        data = np.asarray(values, self.dtype).tobytes()
        try:
            self.file.write(data)
        except OSError as error:
            raise read_error(error, self.path, "turnout.train.data.prepare") from error
        self.sum.update(data)
        self.bytes += len(data)

    def finish(self) -> dict[str, object]:
        try:
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
        except OSError as error:
            raise read_error(error, self.path, "turnout.train.data.prepare") from error
        return {"bytes": self.bytes, "sha256": self.sum.hexdigest()}
