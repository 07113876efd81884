"""What is asked of a generation, what each of its steps tells, and what comes out."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from turnout.errors import UsageError, word
from turnout.models.draw import Drawing, chances
from turnout.models.pieces import reader_of, stops_of

__all__ = ["WHERE", "Asked", "Ending", "Generated", "Piece", "refusal"]

Ending = Literal["tokens", "eos", "stop"]
WHERE = "turnout.generate"


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one step added to B rows, as it is streamed.

    Args:
        step: which, from 0.
        id_B: the new token of each row; None for rows that had ended.
        text_B: what is new of each row's text, whole characters only; empty without a tokenizer. Together the pieces of
            a row are its text.
        why_B: why each row has ended; None while it goes on.

    >>> Piece(0, (7,), ("the",), (None,)).text_B
    ('the',)

    Source: none; plain bookkeeping.
    """

    step: int
    id_B: tuple[int | None, ...]
    text_B: tuple[str, ...]
    why_B: tuple[Ending | None, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Generated:
    """What B prompts became.

    Args:
        id_BT: (B, S + N) int64, prompts and what follows them, with padding before shorter prompts and after rows that
            ended; N steps were needed.
        start: S, where the new tokens begin.
        length_B: (B,) int64, how many new tokens each row has, the one that ended it included.
        why_B: why each row ended: its ``tokens`` were used up, at an ``eos`` token, or at a ``stop`` text.
        text_B: the new text of each row, ending before what it stopped at unless that is kept; None without a
            tokenizer. The tokens of a row are all that were drawn, also where its text was cut.
        logprob_BN: (B, N) the log-probability of each new token as the model has it, before bias, penalties,
            temperature and filters; 0 at padding. None where it was not asked for.

    >>> Generated(torch.tensor([[5, 6, 0], [7, 8, 9]]), 1, torch.tensor([1, 2]), ("eos", "tokens")).rows
    ([6], [8, 9])

    Source: none; plain bookkeeping.
    """

    id_BT: Tensor
    start: int
    length_B: Tensor
    why_B: tuple[Ending, ...]
    text_B: tuple[str, ...] | None = None
    logprob_BN: Tensor | None = None

    @property
    def rows(self) -> tuple[list[int], ...]:
        """The new tokens of each row, without padding."""
        new = zip(self.id_BT[:, self.start :].tolist(), self.length_B.tolist(), strict=True)
        return tuple(id_N[:length] for id_N, length in new)


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """The settings of a generation.

    Args:
        tokens: the most that each row gets, at least 0.
        drawing: how each is drawn.
        eos: the tokens that end a row, which are its last; "model" for those that the model's own generation
            configuration names, if any; None for none.
        stop: texts that end a row, found in its new text wherever tokens begin and end; a special token by its name.
        keep_stop: whether the text of such a row ends with what it stopped at, rather than before it.
        tokenizer: of ``tokenizers`` or transformers; needed for ``stop`` and for text.
        seed: of the draws: a row's depend on it, on its prompt, and on how many rows before it have the same prompt. So
            a prompt goes on in a batch as it does alone, up to the rounding of the model's scores.
        generator: where the chance comes from instead, for the batch as a whole, on any device; torch's default when
            there is neither.
        pad: what stands before shorter prompts and after rows that ended; None for the first of ``eos``, or 0.
        stream: called after every step with its ``Piece``; what it raises ends the generation.
        logprobs: whether to keep those of the tokens that were drawn.

    Raises:
        UsageError: a setting out of its range, stops without a tokenizer, or both a seed and a generator.

    >>> Asked(8, Drawing(temperature=0), stop="###")
    Traceback (most recent call last):
    turnout.errors.UsageError: stop must come with the tokenizer ... Nearest fix: pass tokenizer=... as well.

    Source: none; the settings of ``generate`` of transformers, each by its definition there.
    """

    tokens: int
    drawing: Drawing
    eos: int | Sequence[int] | Literal["model"] | None = None
    stop: str | Sequence[str] | None = None
    keep_stop: bool = False
    tokenizer: Any = None
    seed: int | None = None
    generator: torch.Generator | None = None
    pad: int | None = None
    stream: Callable[[Piece], object] | None = None
    logprobs: bool = False

    def __post_init__(self) -> None:
        if not _is_whole(self.tokens) or self.tokens < 0:
            raise refusal("tokens", self.tokens, "be a whole number of at least 0", "pass tokens=64")
        if self.seed is not None and (not _is_whole(self.seed) or self.generator is not None):
            got = "a generator as well" if self.generator is not None else repr(self.seed)
            raise refusal("seed", got, "be a whole number, without a generator", "pass seed=0 alone")
        if self.stream is not None and not callable(self.stream):
            got, fix = f"a {type(self.stream).__name__}", "pass lambda piece: print(piece.text_B[0], end='')"
            raise refusal("stream", got, "be a function of a Piece", fix)
        self.stops()

    def reader(self) -> Any:
        """What turns tokens into text; None for nothing."""
        return reader_of(self.tokenizer, WHERE)

    def stops(self) -> tuple[str, ...]:
        """The texts to stop at."""
        return stops_of(self.stop, self.reader(), WHERE)

    def ends(self, own: Sequence[int], vocab_size: int) -> list[int]:
        """The tokens that end a row.

        Args:
            own: those that the model names; what is no token of the vocabulary is never drawn, and ends nothing.
            vocab_size: V.

        Raises:
            UsageError: no token of the vocabulary.
        """
        if self.eos == "model":
            return [one for one in own if 0 <= one < vocab_size]
        given: Any = () if self.eos is None else self.eos
        ends = list(given) if isinstance(given, Sequence) else [given]
        if wrong := [one for one in ends if not _is_whole(one) or not 0 <= one < vocab_size]:
            allowed = f"be token ids from 0 to {vocab_size - 1}, 'model' or None"
            raise refusal("eos", wrong[0], allowed, "pass tokenizer.eos_token_id")
        return ends

    def padding(self, ends: Sequence[int], vocab_size: int) -> int:
        """What stands where no token is.

        Raises:
            UsageError: no token of the vocabulary.
        """
        if self.pad is None:
            return ends[0] if ends else 0
        if not _is_whole(self.pad) or not 0 <= self.pad < vocab_size:
            raise refusal("pad", self.pad, f"be a token id from 0 to {vocab_size - 1}, or None", "leave it out")
        return self.pad

    def chance(self, prompts: Sequence[Sequence[int]]) -> Tensor:
        """(B, tokens) numbers from 0 to below 1, which the tokens are drawn with."""
        if self.seed is not None:
            return chances(prompts, self.tokens, self.seed)
        device, dtype = (None if self.generator is None else self.generator.device), torch.float64
        if device is not None and device.type == "mps":  # which has no float64
            dtype = torch.float32
        return torch.rand(len(prompts), self.tokens, generator=self.generator, device=device, dtype=dtype)


def refusal(name: str, got: object, allowed: str, fix: str) -> UsageError:
    """The error for a setting of a generation."""
    return UsageError(word(name, got=got, allowed=allowed, where=WHERE, fix=fix))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
