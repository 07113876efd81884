"""The lane of everything else: each request by itself, with a cache of its own."""

from collections.abc import Callable, Generator, Sequence

import numpy as np
import torch

from turnout.models.going_on import Steps
from turnout.serve.engine.answer import Answer
from turnout.serve.engine.lane import Scores

__all__ = ["PlainLane"]


class PlainLane:
    """Requests of a model that no step is compiled for: adapters, models of transformers as they are, longrope.

    Each is a batch of one, so nobody shares anything with it. A prompt is read at once; others wait meanwhile.

    Args:
        steps: those of the model, for one row and room for so many tokens in it.
        most: how many tokens a text may have; None for any number.
    """

    def __init__(self, steps: Callable[[int, int], Steps], most: int | None) -> None:
        self._make, self._most = steps, most
        self._steps: dict[Answer, Steps] = {}
        self.dropped: list[Answer] = []
        self.load_LE: np.ndarray | None = None

    def why_never(self, prompt: int, tokens: int) -> str | None:
        """Nothing, but for texts that are too long for the model."""
        too_long = self._most is not None and prompt + tokens > self._most
        return f"{prompt} tokens and {tokens} more, of {self._most}" if too_long else None

    def begin(self, answer: Answer) -> bool:
        """Takes a request on."""
        self._steps[answer] = self._make(1, len(answer.request.prompt) + answer.request.tokens)
        return True

    def read(self, answer: Answer) -> Generator[bool, None, Scores | None]:
        """Reads its prompt."""
        yield False
        return Scores(answer, self._steps[answer].prefill(torch.tensor([answer.request.prompt]))[0].float())

    def step(self, answers: Sequence[Answer]) -> list[Scores]:
        """One token more of each."""
        found = []
        for answer in answers:
            try:
                found.append(Scores(answer, self._steps[answer].step(torch.tensor(answer.ids[-1:]))[0].float()))
            except Exception as error:  # one request's; the others go on
                found.append(Scores(answer, None, error=error))
        return found

    def leave(self, answer: Answer) -> None:
        """Forgets a request and its cache."""
        self._steps.pop(answer, None)
