"""The loop of a generation: a token for every row at each step, until each row has come to its end."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, word
from turnout.models.attention import Cache
from turnout.models.generated import WHERE, Asked, Ending, Generated, Piece, refusal
from turnout.models.padding import find_places
from turnout.models.pieces import Pieces
from turnout.models.prompts import Given, Prompts, read_prompts

__all__ = ["Cached", "Scores", "go_on"]


class Scores(Protocol):
    """What scores the token after the last position; called with ever more of the same tokens.

    Source: none; plain bookkeeping.
    """

    def __call__(self, id_BT: Tensor, real_BT: Tensor | None) -> Tensor:
        """(B, V), from all tokens so far and which of them are no padding; None for all."""


class Cached:
    """The scores of an LM, which remembers what it has seen.

    Source: none; plain bookkeeping.
    """

    def __init__(self, lm: Any) -> None:
        self._lm, self._cache = lm, Cache()

    def __call__(self, id_BT: Tensor, real_BT: Tensor | None) -> Tensor:
        """As ``Scores``."""
        seen = self._cache.length
        new_BS, mask = id_BT[:, seen:], None if real_BT is None else real_BT[:, seen:]
        if self._lm.rope.changes(seen, new_BS.shape[1], find_places(new_BS, mask, self._cache)):
            self._cache, new_BS, mask = Cache(), id_BT, real_BT
        return self._lm(new_BS, attention_mask=mask, cache=self._cache).logits_BSV[:, -1]


@torch.no_grad()
def go_on(
    model: nn.Module,
    scores: Scores,
    prompts: Given,
    asked: Asked,
    *,
    attention_mask: Tensor | None,
    own: Sequence[int] = (),
) -> Generated:
    """What a model makes of prompts.

    Args:
        model: which is in evaluation mode meanwhile.
        scores: of its tokens, of a model that has seen none.
        prompts: as in ``turnout.generate``.
        asked: the settings.
        attention_mask: as in ``turnout.generate``.
        own: the tokens that the model says end a text.

    Raises:
        UsageError: as ``turnout.generate``.

    Source: none; ``generate`` of transformers.
    """
    config: Any = model.config
    vocab_size, room = config.vocab_size, getattr(config, "max_seq", None)  # which transformers does not mind
    ends = asked.ends(own, vocab_size)
    pad, device = asked.padding(ends, vocab_size), next(model.parameters()).device
    read = read_prompts(prompts, attention_mask, vocab_size=vocab_size, pad=pad, device=device, where=WHERE)
    if room is not None:
        _check_length(read, asked.tokens, room)
    was_training = model.training
    model.eval()
    try:
        batch, rows = _Batch(read, asked, pad, vocab_size), _Rows(read, asked, frozenset(ends))
        while rows.on:
            rows.add(batch.take(scores(*batch.so_far), rows))
        return batch.made(rows)
    finally:
        model.train(was_training)


def _check_length(prompts: Prompts, tokens: int, room: int) -> None:
    row, length = prompts.longest()
    if length + tokens <= room:
        return
    of = f"prompt {row}" if len(prompts.id_BS) > 1 else "the prompt"
    fix = f"pass tokens={room - length}" if length < room else f"shorten it to at most {max(room - tokens, 1)} tokens"
    allowed = f"end within the model's max_seq={room}"
    got = f"{length} tokens in {of}, and tokens={tokens} more"
    raise ShapeError(word("a prompt and what follows", got=got, allowed=allowed, where=WHERE, fix=fix))


class _Batch:
    """The tokens of all rows, as they become more."""

    def __init__(self, prompts: Prompts, asked: Asked, pad: int, vocab_size: int) -> None:
        more, id_BS, real_BS = asked.tokens, prompts.id_BS, prompts.real_BS
        self._drawing, self._pad, self._first = asked.drawing, pad, prompts.padding
        self._start = self._end = id_BS.shape[1]
        self._id_BT = nn.functional.pad(id_BS, (0, more), value=pad) if more else id_BS
        self._real_BT = None if real_BS is None else nn.functional.pad(real_BS, (0, more), value=True)
        greedy = asked.drawing.temperature == 0
        chance_BN = id_BS.new_zeros(1, 1).expand(len(id_BS), more) if greedy else asked.chance(prompts.rows)
        self._chance_BN = chance_BN.to(id_BS.device)
        self._logprob_BN = torch.zeros(len(id_BS), more, device=id_BS.device) if asked.logprobs else None
        self._seen_BV = None
        if asked.drawing.repetition_penalty != 1:
            # A place behind the vocabulary for what is not there: padding.
            real_id_BS = id_BS if real_BS is None else id_BS.masked_fill(~real_BS, vocab_size)
            seen_BV = torch.zeros(len(id_BS), vocab_size + 1, dtype=torch.bool, device=id_BS.device)
            self._seen_BV = seen_BV.scatter_(1, real_id_BS, True)[:, :vocab_size]

    @property
    def so_far(self) -> tuple[Tensor, Tensor | None]:
        """The tokens, without what is padding in every row, and which of them are none in some."""
        here = slice(self._first, self._end)
        return self._id_BT[:, here], None if self._real_BT is None else self._real_BT[:, here]

    def take(self, score_BV: Tensor, rows: "_Rows") -> list[int]:
        """The next token of every row: padding in those that have ended."""
        step = self._end - self._start
        if not bool(score_BV.amax(1).isfinite().all()):
            allowed, fix = (
                "be numbers",
                "look at the weights; in float16 large values overflow: try bfloat16 or float32",
            )
            raise refusal("the model's scores", f"infinity or not a number at new token {step}", allowed, fix)
        new_B = self._drawing.pick(score_BV, self._chance_BN[:, step], self._seen_BV)
        on_B = torch.tensor(rows.on_B, device=new_B.device)
        if not all(rows.on_B):
            new_B = new_B.where(on_B, self._pad)
            self._real_BT = torch.ones_like(self._id_BT, dtype=torch.bool) if self._real_BT is None else self._real_BT
            self._real_BT[:, self._end] = on_B
        self._id_BT[:, self._end] = new_B
        if self._seen_BV is not None:
            self._seen_BV.scatter_(1, new_B[:, None], True)
        if self._logprob_BN is not None:
            self._logprob_BN[:, step] = score_BV.float().log_softmax(1).gather(1, new_B[:, None])[:, 0] * on_B
        self._end += 1
        return new_B.tolist()

    def made(self, rows: "_Rows") -> Generated:
        """All of it."""
        logprob_BN = None if self._logprob_BN is None else self._logprob_BN[:, : self._end - self._start]
        length_B = torch.tensor(rows.length_B)
        id_BT = self._id_BT if self._end == self._id_BT.shape[1] else self._id_BT[:, : self._end].clone()
        return Generated(id_BT, self._start, length_B, rows.endings, rows.text_B, logprob_BN)


class _Rows:
    """Which rows go on, why others do not, and what each says."""

    def __init__(self, prompts: Prompts, asked: Asked, ends: frozenset[int]) -> None:
        reader, stops, rows = asked.reader(), asked.stops(), prompts.rows
        self._ends, self._stream, self._tokens, self._step = ends, asked.stream, asked.tokens, 0
        self._why_B: list[Ending | None] = [None if asked.tokens else "tokens"] * len(rows)
        self._pieces = None if reader is None else [Pieces(reader, row, stops, asked.keep_stop) for row in rows]
        self.length_B = [0] * len(rows)

    @property
    def on(self) -> bool:
        """Whether some row goes on."""
        return None in self._why_B

    @property
    def on_B(self) -> list[bool]:
        """Which rows go on."""
        return [why is None for why in self._why_B]

    @property
    def endings(self) -> tuple[Ending, ...]:
        """Why each row ended, once all have."""
        return tuple(why for why in self._why_B if why is not None)

    @property
    def text_B(self) -> tuple[str, ...] | None:
        """What each row says."""
        return None if self._pieces is None else tuple(pieces.text for pieces in self._pieces)

    def add(self, id_B: Sequence[int]) -> None:
        """Takes the new tokens; those of rows that have ended do not count."""
        on_B, text_B = self.on_B, [""] * len(id_B)
        for row, token in enumerate(id_B):
            if on_B[row]:
                self.length_B[row] += 1
                text_B[row] = self._say(row, token, last=self._step + 1 == self._tokens)
        if self._stream is not None:
            new_B = tuple(token if on else None for token, on in zip(id_B, on_B, strict=True))
            self._stream(Piece(self._step, new_B, tuple(text_B), tuple(self._why_B)))
        self._step += 1

    def _say(self, row: int, token: int, *, last: bool) -> str:
        """What is new of a row's text; the row ends where it ends."""
        why: Ending | None = "eos" if token in self._ends else "tokens" if last else None
        said = ""
        if self._pieces is not None:
            pieces = self._pieces[row]
            said = pieces.add(token) + ("" if why is None else pieces.end())
            why = "stop" if pieces.stopped else why
        self._why_B[row] = why
        return said
