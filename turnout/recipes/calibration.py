"""Text for methods that look at what a model does with it: read with the model's own tokenizer, in rows of ids."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from turnout.errors import DataError, word
from turnout.models import LMConfig
from turnout.models.checkpoint.own import is_carried
from turnout.train.data import load_tokenizer, read_documents
from turnout.train.data.document import NotTextError
from turnout.train.data.spaced import Spaced, spaced
from turnout.train.data.tokenizer import opening_ids, refuse_chance

__all__ = ["LONGEST_ROW", "Calibration", "calibration", "find_tokenizer", "whole_text"]

_WHERE = "turnout convert --calibration"
_SEQ, _ROWS = 512, 8
# What transformers makes a tokenizer.json of.
_OTHERS = ("tokenizer", "vocab", "merges", "tekken", "sentencepiece", "spiece", "bpe")
LONGEST_ROW = 1024
# The most logits of one batch: 256 MB in fp32.
_LOGITS = 2**26


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Batches of (B, S) token ids, and where they come from.

    Args:
        batches: what steps look at.
        source: the file or folder.
        documents: how many were read.
        skipped: how many files held no text, and how many rows could not be read as text.
        held_out: the text behind it, which no step looks at.
        held_out_bytes: that the predicted tokens of ``held_out`` stand for.
        predicted: (B, S) bool for each of ``held_out``: all tokens but the first of each row and what opens a document.

    Source: none; plain bookkeeping.
    """

    batches: tuple[Tensor, ...]
    source: str
    documents: int
    skipped: int
    held_out: tuple[Tensor, ...] = ()
    held_out_bytes: int = 0
    predicted: tuple[Tensor, ...] = ()

    @property
    def tokens(self) -> int:
        """How many steps look at."""
        return sum(batch.numel() for batch in self.batches)

    def to_json_dict(self) -> dict[str, object]:
        """What run.json holds of it; never the text."""
        return {
            "source": self.source,
            "tokens": self.tokens,
            "held_out_tokens": sum(batch.numel() for batch in self.held_out),
            "documents": self.documents,
            "skipped": self.skipped,
        }


def find_tokenizer(folder: Path, *, where: str = _WHERE) -> Path:
    """The tokenizer.json that belongs to the model in this folder.

    Raises:
        DataError: there is none.
    """
    for place in (folder, folder / "origin", folder.parent):
        if (place / "tokenizer.json").is_file():
            return place / "tokenizer.json"
    fix = f"copy the tokenizer.json that it was trained with into {folder}"
    if any(file.is_file() and is_carried(file) and file.name.startswith(_OTHERS) for file in folder.iterdir()):
        fix = f'run AutoTokenizer.from_pretrained("{folder}").save_pretrained("{folder}"), which writes one'
    raise DataError(
        word("the model", got=str(folder), allowed="have its tokenizer.json beside it", where=where, fix=fix)
    )


def calibration(source: str | Path, folder: Path, *, vocab_size: int, max_seq: int, tokens: int) -> Calibration:
    """The first ``tokens`` tokens of the text, in rows of at most 512, and rows behind them that are held out.

    Held out is an eighth as much again; where the text is shorter, its last ninth, at least a row if there are two.

    Args:
        source: a file or folder of text, jsonl or parquet.
        folder: of the model, which holds its tokenizer.
        vocab_size: of the model.
        max_seq: the most tokens that it takes at once.
        tokens: how many to take, about.

    Raises:
        DataError: no tokenizer, no text, or tokens that the model does not have.
    """
    place = find_tokenizer(folder)
    wanted = tokens + max(tokens // 8, min(_SEQ, max_seq, tokens))
    tokenizer = load_tokenizer(place)
    refuse_chance(tokenizer)
    ids, sizes, opens, seen, left_out = _read(source, tokenizer, wanted)
    wrong = [token for token in ids if token >= vocab_size]
    if wrong or not ids:
        got = f"the token {wrong[0]} of {place}" if wrong else f"{source}, which holds no text{_why(left_out)}"
        allowed = f"give tokens from 0 to {vocab_size - 1}"
        fix = "use the tokenizer that the model was trained with" if wrong else "name a file or folder with text in it"
        raise DataError(word("the calibration text", got=got, allowed=allowed, where=_WHERE, fix=fix))
    seq = min(_SEQ, max_seq, tokens, len(ids))
    id_RS = torch.tensor(ids[: len(ids) // seq * seq]).view(-1, seq)
    size_RS = torch.tensor(sizes[: id_RS.numel()]).view(-1, seq)
    taken = max(1, min(tokens // seq, len(id_RS) - max(1, len(id_RS) // 9)))
    rows = max(1, min(_ROWS, _LOGITS // (seq * vocab_size)))
    text_RS = _text(opens[: id_RS.numel()], seq)
    behind = len(id_RS) > taken
    return Calibration(
        id_RS[:taken].split(rows),
        str(source),
        seen,
        len(left_out),
        id_RS[taken:].split(rows) if behind else (),
        int(size_RS[taken:, 1:].sum()),
        text_RS[taken:].split(rows) if behind else (),
    )


def whole_text(sources: list[str], folder: Path, *, config: LMConfig, limit: int | None) -> Calibration:
    """All of a text, or its first ``limit`` tokens, as what is held out: rows of up to 1024, the last one shorter.

    Args:
        sources: files and folders of text, jsonl or parquet.
        folder: of the model, which holds its tokenizer.
        config: of the model.
        limit: about how many tokens to take; None for all.

    Raises:
        DataError: no tokenizer, no text, or tokens that the model does not have.
    """
    place = find_tokenizer(folder, where="turnout eval")
    ids, sizes, opens, seen, left_out = _read(sources, load_tokenizer(place), limit or sys.maxsize)
    if max(ids, default=-1) >= config.vocab_size or not ids:
        got = f"the token {max(ids)} of {place}" if ids else f"{', '.join(sources)}: no text{_why(left_out)}"
        fix = "use the tokenizer that the model was trained with" if ids else "name a file or folder with text in it"
        allowed = f"give tokens from 0 to {config.vocab_size - 1}"
        raise DataError(word("the text", got=got, allowed=allowed, where="turnout", fix=fix))
    seq = min(LONGEST_ROW, config.max_seq, len(ids))
    whole = len(ids) // seq * seq
    rows = max(1, min(_ROWS, _LOGITS // (seq * config.vocab_size)))
    batches = list(torch.tensor(ids[:whole]).view(-1, seq).split(rows))
    predicted = list(_text(opens[:whole], seq).split(rows))
    size = int(torch.tensor(sizes[:whole]).view(-1, seq)[:, 1:].sum())
    if len(ids) - whole > 1:
        batches.append(torch.tensor([ids[whole:]]))
        predicted.append(_text(opens[whole:], len(ids) - whole))
        size += sum(sizes[whole + 1 :])
    if seq < 2:
        batches, predicted = [], []
    return Calibration((), ", ".join(sources), seen, len(left_out), tuple(batches), size, tuple(predicted))


def _text(opens: list[bool], seq: int) -> Tensor:
    """(R, seq), which tokens are predicted: those of the text, but for the first of each row."""
    text_RS = ~torch.tensor(opens, dtype=torch.bool).view(-1, seq)
    text_RS[:, 0] = False
    return text_RS


def _read(
    source: str | Path | list[str], tokenizer: Tokenizer, wanted: int
) -> tuple[list[int], list[int], list[bool], int, list[str]]:
    """Token ids, the bytes of each, which open a document, how many documents were read, and what was left out."""
    ids, sizes, opens = list[int](), list[int](), list[bool]()
    seen, left_out = 0, list[str]()
    opening, table = opening_ids(tokenizer, needed=False), spaced(tokenizer)
    for document in read_documents(source, left_out=lambda _, name: left_out.append(name)):
        try:
            for number, piece in enumerate(_ids(document.pieces(), tokenizer, opening, table)):
                ids += piece[0]
                sizes += piece[1]
                opens += [number == 0 and place < len(opening) for place in range(len(piece[0]))]
                if len(ids) >= wanted:
                    break
        except NotTextError:
            if not document.optional:
                raise
            left_out.append(document.name)
            continue
        seen += 1
        if len(ids) >= wanted:
            break
    return ids[:wanted], sizes[:wanted], opens[:wanted], seen, left_out


def _why(left_out: list[str]) -> str:
    """What was left out of the text, in brackets."""
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f" (left out: {', '.join(left_out[:3])}{more})" if left_out else ""


def _ids(
    pieces: Iterator[bytes], tokenizer: Tokenizer, opening: tuple[int, ...], table: Spaced | None
) -> Iterator[tuple[list[int], list[int]]]:
    for number, piece in enumerate(pieces):
        start, text = opening if number == 0 else (), piece.decode()
        if table is None:
            found, fed, sizes = tokenizer.encode(text, add_special_tokens=False), text, None
        else:
            found, fed, sizes = table.read(text, within=number > 0)
        if sizes is None:
            sizes = _sizes(fed, [end for _, end in found.offsets])
        yield [*start, *found.ids], [0] * len(start) + sizes


def _sizes(text: str, ends: list[int]) -> list[int]:
    """The bytes of each token, of all tokens together those of the text: what lies between two goes to the second."""
    sizes, place = list[int](), 0
    for end in ends:
        sizes.append(len(text[place:end].encode()))
        place = max(place, end)
    if sizes:
        sizes[-1] += len(text[place:].encode())
    return sizes
