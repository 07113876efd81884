"""What a lane is: how requests for one model are read and taken on, whichever way it is computed."""

import dataclasses
from collections.abc import Generator, Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from turnout.serve.engine.answer import Answer, Routes

__all__ = ["Lane", "Scores"]


@dataclasses.dataclass(frozen=True, eq=False)
class Scores:
    """What a model says of a request's next token.

    Args:
        answer: whose.
        score_V: (V,) the scores; None where it failed.
        best: the likeliest token, where somebody has looked already.
        routes: the experts that were taken.
        error: why it failed.
    """

    answer: Answer
    score_V: Tensor | None
    best: int | None = None
    routes: Routes | None = None
    error: Exception | None = None


class Lane(Protocol):
    """How one model answers. One thread calls it.

    Source: none; plain bookkeeping.
    """

    # Requests that gave up what they had for others, and are to begin again.
    dropped: list[Answer]
    # (layers, E) how often each expert was taken, None where nobody counts.
    load_LE: np.ndarray | None

    def why_never(self, prompt: int, tokens: int) -> str | None:
        """Why such a request can never be answered; None where it can."""

    def begin(self, answer: Answer) -> bool:
        """Takes a request on; False where there is no memory for it now."""

    def read(self, answer: Answer) -> Generator[bool, None, Scores | None]:
        """Reads its text in small pieces of work, and stops where others may go on; True where others may read.

        What comes out are the scores of its next token; None where steps say them.
        """

    def step(self, answers: Sequence[Answer]) -> list[Scores]:
        """Goes on with those that were read, and says what it has scores of."""

    def leave(self, answer: Answer) -> None:
        """Forgets a request, however far it is."""
