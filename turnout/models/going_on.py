"""The loop of a generation: a token for every row at each step, until each row has come to its end."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from turnout.errors import ShapeError, word
from turnout.models.generated import WHERE, Asked, Ending, Generated, Piece, refusal
from turnout.models.pieces import Pieces
from turnout.models.prompts import Given, Prompts, read_prompts

__all__ = ["Steps", "go_on"]


class Steps(Protocol):
    """What reads prompts once, and then a token of every row at each step, as ``turnout.models.decoding.Decoder`` does.

    Source: none; plain bookkeeping.
    """

    def prefill(self, id_BS: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, V) the scores of the token after each prompt; shorter ones have anything after them."""

    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores of the token after one more of each row."""

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone."""


@torch.no_grad()
def go_on(
    model: nn.Module,
    steps: Callable[[int, int], Steps],
    prompts: Given,
    asked: Asked,
    *,
    attention_mask: Tensor | None,
    own: Sequence[int] = (),
) -> Generated:
    """What a model makes of prompts.

    Args:
        model: which is in evaluation mode meanwhile.
        steps: those of the model, for so many rows, and room for so many tokens in each.
        prompts: as in ``turnout.generate``.
        asked: the settings.
        attention_mask: as in ``turnout.generate``.
        own: the tokens that the model says end a text.

    Raises:
        UsageError: as ``turnout.generate``.

    Source: none; ``generate`` of transformers.
    """
    config: Any = model.config
    vocab_size, ends = config.vocab_size, asked.ends(own, config.vocab_size)
    pad, device = asked.padding(ends, vocab_size), next(model.parameters()).device
    read = read_prompts(prompts, attention_mask, vocab_size=vocab_size, pad=pad, device=device, where=WHERE)
    texts = read.rows
    need = _checked_length(texts, asked.tokens, getattr(config, "max_seq", None))  # transformers does not mind
    batch, rows, was_training = _Batch(read, asked, pad, vocab_size), _Rows(texts, asked, ends), model.training
    model.eval()
    try:
        if rows.on:
            _run(steps(len(texts), need), read.packed(pad), batch, rows)
        return batch.made(rows)
    finally:
        model.train(was_training)


def _run(steps: Steps, prompts: tuple[Tensor, Tensor | None], batch: "_Batch", rows: "_Rows") -> None:
    score_NV, on = steps.prefill(*prompts), rows.on
    while True:
        new_N = batch.take(score_NV, on)
        rows.add(new_N.tolist())
        before, on = on, rows.on
        if not on:
            return
        if len(on) < len(before):
            place_N = torch.tensor([before.index(row) for row in on], device=new_N.device)
            steps.keep(place_N)
            new_N = new_N[place_N]
        score_NV = steps.step(new_N)


def _checked_length(texts: Sequence[Sequence[int]], tokens: int, room: int | None) -> int:
    """How long the longest row becomes; refused where the model does not take it."""
    length_B = [len(text) for text in texts]
    length = max(length_B)
    if room is None or length + tokens <= room:
        return length + tokens
    of = f"prompt {length_B.index(length)}" if len(texts) > 1 else "the prompt"
    fix = f"pass tokens={room - length}" if length < room else f"shorten it to at most {max(room - tokens, 1)} tokens"
    allowed, got = f"end within the model's max_seq={room}", f"{length} tokens in {of}, and tokens={tokens} more"
    raise ShapeError(word("a prompt and what follows", got=got, allowed=allowed, where=WHERE, fix=fix))


class _Batch:
    """The tokens of all rows, as they become more."""

    def __init__(self, prompts: Prompts, asked: Asked, pad: int, vocab_size: int) -> None:
        more, id_BS, real_BS = asked.tokens, prompts.id_BS, prompts.real_BS
        self._drawing, self._start, self._end = asked.drawing, id_BS.shape[1], id_BS.shape[1]
        self._id_BT = nn.functional.pad(id_BS, (0, more), value=pad) if more else id_BS
        greedy = asked.drawing.temperature == 0
        chance_BN = id_BS.new_zeros(1, 1).expand(len(id_BS), more) if greedy else asked.chance(prompts.rows)
        self._chance_BN = chance_BN.to(id_BS.device)
        self._logprob_BN = torch.zeros(len(id_BS), more, device=id_BS.device) if asked.logprobs else None
        asked.drawing.check_ids(vocab_size)
        self._drawn_BV = None
        if asked.drawing.counts:
            self._drawn_BV = torch.zeros(len(id_BS), vocab_size, dtype=torch.int32, device=id_BS.device)
        self._seen_BV = None
        if asked.drawing.repetition_penalty != 1:
            # Padding stands at a place behind the vocabulary, which is then cut off.
            real_id_BS = id_BS if real_BS is None else id_BS.masked_fill(~real_BS, vocab_size)
            seen_BV = torch.zeros(len(id_BS), vocab_size + 1, dtype=torch.bool, device=id_BS.device)
            self._seen_BV = seen_BV.scatter_(1, real_id_BS, True)[:, :vocab_size]

    def take(self, score_NV: Tensor, rows: Sequence[int]) -> Tensor:
        """(N,) the next tokens of these rows, by their scores."""
        step, row_N = self._end - self._start, torch.tensor(rows, device=score_NV.device)
        if not bool(score_NV.amax(1).isfinite().all()):
            fix = "look at the weights; in float16 large values overflow: try bfloat16 or float32"
            got = f"infinity or no number at new token {step}"
            raise refusal("the model's scores", got, "be finite numbers", fix)
        seen_NV = None if self._seen_BV is None else self._seen_BV[row_N]
        drawn_NV = None if self._drawn_BV is None else self._drawn_BV[row_N]
        new_N = self._drawing.pick(score_NV, self._chance_BN[row_N, step], seen_NV, drawn_NV)
        self._id_BT[row_N, self._end] = new_N
        if self._seen_BV is not None:
            self._seen_BV[row_N, new_N] = True
        if self._drawn_BV is not None:
            self._drawn_BV[row_N, new_N] += 1
        if self._logprob_BN is not None:
            self._logprob_BN[row_N, step] = score_NV.float().log_softmax(1).gather(1, new_N[:, None])[:, 0]
        self._end += 1
        return new_N

    def made(self, rows: "_Rows") -> Generated:
        """All of it."""
        logprob_BN = None if self._logprob_BN is None else self._logprob_BN[:, : self._end - self._start]
        id_BT = self._id_BT if self._end == self._id_BT.shape[1] else self._id_BT[:, : self._end].clone()
        return Generated(id_BT, self._start, torch.tensor(rows.length_B), rows.endings, rows.text_B, logprob_BN)


class _Rows:
    """Which rows go on, why others do not, and what each says."""

    def __init__(self, texts: Sequence[Sequence[int]], asked: Asked, ends: Sequence[int]) -> None:
        reader, stops = asked.reader(), asked.stops()
        self._ends, self._stream, self._tokens, self._step = ends, asked.stream, asked.tokens, 0
        self._why_B: list[Ending | None] = [None if asked.tokens else "tokens"] * len(texts)
        self._pieces = None if reader is None else [Pieces(reader, text, stops, asked.keep_stop) for text in texts]
        self.length_B = [0] * len(texts)

    @property
    def on(self) -> list[int]:
        """Which rows go on."""
        return [row for row, why in enumerate(self._why_B) if why is None]

    @property
    def endings(self) -> tuple[Ending, ...]:
        """Why each row ended, once all have."""
        return tuple(why for why in self._why_B if why is not None)

    @property
    def text_B(self) -> tuple[str, ...] | None:
        """What each row says."""
        return None if self._pieces is None else tuple(pieces.text for pieces in self._pieces)

    def add(self, id_N: Sequence[int]) -> None:
        """Takes the new tokens of the rows that go on."""
        new_B: list[int | None] = [None] * len(self._why_B)
        text_B = [""] * len(self._why_B)
        for row, token in zip(self.on, id_N, strict=True):
            new_B[row] = token
            self.length_B[row] += 1
            text_B[row] = self._say(row, token, last=self._step + 1 == self._tokens)
        if self._stream is not None:
            self._stream(Piece(self._step, tuple(new_B), tuple(text_B), tuple(self._why_B)))
        self._step += 1

    def _say(self, row: int, token: int, *, last: bool) -> str:
        """What is new of a row's text; the row ends where it ends."""
        why: Ending | None = "eos" if token in self._ends else "tokens" if last else None
        said = ""
        if self._pieces is not None:
            pieces = self._pieces[row]
            said = pieces.add_end(token) if why == "eos" else pieces.add(token) + ("" if why is None else pieces.end())
            why = "stop" if pieces.stopped else why
        self._why_B[row] = why
        return said
