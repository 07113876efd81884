"""Decoding by the compiled step: prompts in parts between fixed positions, then a token of every row in one call."""

from collections.abc import Generator

import torch
from torch import Tensor

from turnout.models.decoding.chunk import Chunk
from turnout.models.decoding.paged import PagedSteps
from turnout.models.decoding.pages import PAGE, Pages, Text, pages_of
from turnout.models.lm import LM

__all__ = ["CompiledSteps", "finish"]


class CompiledSteps:
    """Prompts and steps for a model that ``why_plain`` has nothing against; each row has the bits that it has alone.

    Of longrope all rows are on the same side of its border; ``turnout.models.decoding.sides`` sees to that.
    """

    def __init__(self, lm: LM, batch: int, room: int, rank_B: Tensor | None = None) -> None:
        self._lm, self._room = lm, min(room, lm.config.max_seq)
        self._rank_B = [0] * batch if rank_B is None else rank_B.tolist()
        self._pages = Pages(lm, [batch * self._each(window) for window in Pages.windows_of(lm)])
        self._steps = PagedSteps(lm, self._pages)
        self._texts: list[Text] = []

    def _each(self, window: int | None) -> int:
        """How many pages a row takes at first."""
        return min(pages_of(self._room), pages_of(self._room) if window is None else pages_of(window) + 1)

    def prefill(self, id_BS: Tensor, length_B: Tensor) -> Tensor:
        """(B, V) the scores after each row's last token; what was there before is forgotten."""
        for text in self._texts:
            self._pages.free(text)
        lengths, full = length_B.tolist(), self._each(None)
        self._steps.entries.of_texts(max(lengths))
        self._texts = [self._pages.begin(near=row * full) for row in range(len(lengths))]
        for text, rank in zip(self._texts, self._rank_B, strict=True):
            text.rank = rank
        score_BV = torch.empty(len(lengths), self._lm.config.vocab_size, dtype=torch.float32)
        short: list[tuple[int, list[int]]] = []
        for row, (text, id_S) in enumerate(zip(self._texts, id_BS.tolist(), strict=True)):
            for start, end in self._steps.parts_of(0, lengths[row]):
                if self._steps.is_short(end - start):
                    short.append((row, id_S[start:end]))
                else:
                    self._extend([text], end, steps=False)
                    score_BV[row] = self._read(text, id_S[start:end], last=end == lengths[row])
        self._read_short(short, score_BV)
        return score_BV

    def _read(self, text: Text, id_S: list[int], *, last: bool) -> Tensor:
        """(V,) the scores after one part, where it is the last."""
        chunk = finish(self._steps.read(text, id_S))
        self._pages.trim(text)
        return self._lm.scores(chunk.hidden_1D)[0].float() if last else chunk.hidden_1D.new_zeros(())

    def _read_short(self, short: list[tuple[int, list[int]]], score_BV: Tensor) -> None:
        """The ends of prompts that are short, as many at once as the step is for."""
        while short:
            count = tokens = 0
            while count < len(short) and (not count or tokens + len(short[count][1]) <= self._steps.few):
                tokens += len(short[count][1])
                count += 1
            some, short = short[:count], short[count:]
            texts = [self._texts[row] for row, _ in some]
            for text, (_, id_N) in zip(texts, some, strict=True):
                self._extend([text], text.length + len(id_N), steps=True)
            score_BV[[row for row, _ in some]] = self._steps.step(texts, [id_N for _, id_N in some])
            for text in texts:
                self._pages.trim(text)

    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores after one more token of each row, in memory that the next step writes to again.

        Nobody looks here whether there are such tokens.
        """
        for text in self._texts:
            if text.length % PAGE == 0:
                self._pages.trim(text)
                self._extend([text], text.length + 1, steps=True)
        return self._steps.step(self._texts, id_B[:, None].tolist())

    def _extend(self, texts: list[Text], end: int, *, steps: bool) -> None:
        """Gives pages to each, more of which are made where they lack: by a quarter, so that little is copied often."""
        for text in texts:
            if self._pages.extend(text, end, steps=steps):
                continue
            lacking = self._pages.needed(text, end, steps=steps)
            pools = self._pages.pools
            more = [max(0, len(one) - pool.free) for one, pool in zip(lacking, pools, strict=True)]
            grown = [
                pool.count + (max(few, len(self._texts), pool.count // 4) if few else 0)
                for few, pool in zip(more, pools, strict=True)
            ]
            self._pages.grow(grown)
            done = self._pages.extend(text, end, steps=steps)
            assert done

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        rows = row_N.tolist()
        for row, text in enumerate(self._texts):
            if row not in rows:
                self._pages.free(text)
        self._texts = [self._texts[row] for row in rows]
        self._rank_B = [self._rank_B[row] for row in rows]


def finish(reading: Generator[None, None, Chunk]) -> Chunk:
    """What comes of a part that is read without a break."""
    while True:
        try:
            next(reading)
        except StopIteration as done:
            return done.value
