"""Steps of a model whose frequencies depend on how long a text is: rows of one side of that border go together."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from turnout.models.going_on import Steps

__all__ = ["Sides"]


class Sides:
    """Prompts and steps of longrope: each row has the frequencies of its own length, whatever stands beside it.

    In a batch of mixed lengths a model has those of the longest row for all. So rows on either side of the border are
    separate batches, and a row that comes to it is read anew, as its keys no longer hold.

    Args:
        make: the steps of so many rows.
        border: the most tokens that a text on the short side has.

    Source: Ding et al., 2024, "LongRoPE"; ``generate`` of transformers, for a text alone.
    """

    def __init__(self, make: Callable[[int], Steps], border: int) -> None:
        self._make, self._border = make, border
        self._texts: list[list[int]] = []
        self._parts: list[tuple[list[int], Steps]] = []  # which rows, and the steps that hold them in this order

    def prefill(self, id_BS: Tensor, lengths: Tensor | None = None) -> Tensor:
        """(B, V) the scores after each row's last token; what was there before is forgotten."""
        length_B = [id_BS.shape[1]] * len(id_BS) if lengths is None else lengths.tolist()
        self._texts = [text[:length] for text, length in zip(id_BS.tolist(), length_B, strict=True)]
        self._parts = []
        sides = [[], []]
        for row, length in enumerate(length_B):
            sides[length > self._border].append(row)
        return _joined([(rows, self._read(rows, id_BS.device)) for rows in sides if rows])

    def step(self, id_B: Tensor) -> Tensor:
        """(B, V) the scores after one more token of each row."""
        over = [row for row, text in enumerate(self._texts) if len(text) == self._border]
        if over:
            self._only([row for row in range(len(self._texts)) if row not in over])
        found = [(rows, steps.step(id_B[rows])) for rows, steps in self._parts]
        # What refuses a token has not read it: it is a part of the text once all have.
        for text, new in zip(self._texts, id_B.tolist(), strict=True):
            text.append(new)
        return _joined([*found, (over, self._read(over, id_B.device))] if over else found)

    def keep(self, row_N: Tensor) -> None:
        """Goes on with these rows alone, in this order."""
        rows = row_N.tolist()
        self._only(rows)
        self._texts = [self._texts[row] for row in rows]
        self._parts = [([rows.index(row) for row in held], steps) for held, steps in self._parts]

    def _read(self, rows: list[int], device: torch.device) -> Tensor:
        """The scores after the texts of these rows, which become a part."""
        texts = [torch.tensor(self._texts[row]) for row in rows]
        steps = self._make(len(rows))
        self._parts.append((rows, steps))
        length_N = torch.tensor([len(text) for text in texts], device=device)
        return steps.prefill(torch.nn.utils.rnn.pad_sequence(texts, batch_first=True).to(device), length_N)

    def _only(self, rows: Sequence[int]) -> None:
        """Parts without all other rows, which are still called what they were."""
        parts, self._parts = self._parts, []
        for held, steps in parts:
            place_N = [place for place, row in enumerate(held) if row in rows]
            if place_N and len(place_N) < len(held):
                steps.keep(torch.tensor(place_N))
            if place_N:
                self._parts.append(([held[place] for place in place_N], steps))


def _joined(found: Sequence[tuple[list[int], Tensor]]) -> Tensor:
    """The scores of all rows, in their order."""
    order = [row for rows, _ in found for row in rows]
    score_BV = torch.cat([score_NV for _, score_NV in found]) if len(found) > 1 else found[0][1]
    return score_BV if order == sorted(order) else score_BV[torch.tensor(order).argsort()]
