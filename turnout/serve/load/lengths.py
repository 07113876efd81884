"""How long prompts and answers are: one length, or several with their weights."""

import dataclasses
import math

import numpy as np

from turnout.errors import UsageError, word

__all__ = ["LengthMix"]


@dataclasses.dataclass(frozen=True)
class LengthMix:
    """Lengths in tokens, and how often each is drawn.

    Args:
        lengths: at least one, each at least 1.
        weights: as many, above 0; they need not sum to 1.

    Raises:
        UsageError: no lengths, or such that cannot be drawn.

    >>> LengthMix.parse("128:0.75,2048:0.25").mean
    608.0
    >>> str(LengthMix.parse("64"))
    '64'

    Source: none; plain bookkeeping.
    """

    lengths: tuple[int, ...]
    weights: tuple[float, ...]

    def __post_init__(self) -> None:
        fits = len(self.lengths) == len(self.weights) >= 1 and all(length >= 1 for length in self.lengths)
        if not fits or not all(0 < weight < math.inf for weight in self.weights):
            raise _refusal("lengths", (self.lengths, self.weights), "LengthMix")

    @staticmethod
    def parse(text: str, *, what: str = "lengths") -> "LengthMix":
        """Reads ``LENGTH[:WEIGHT],...``; a weight that is not there is 1.

        Args:
            text: what the user wrote.
            what: what it says the lengths of, for the error.

        Raises:
            UsageError: it cannot be read so.
        """
        lengths, weights = [], []
        try:
            for part in text.split(","):
                length, _, weight = part.partition(":")
                lengths.append(int(length))
                weights.append(float(weight) if weight else 1.0)
            return LengthMix(tuple(lengths), tuple(weights))
        except ValueError as error:
            raise _refusal(what, text, "turnout bench-serve") from error

    @property
    def mean(self) -> float:
        """The length to be expected."""
        return float(np.average(self.lengths, weights=self.weights))

    def draw(self, count: int, generator: np.random.Generator) -> list[int]:
        """So many of them.

        Args:
            count: how many.
            generator: where the chance comes from.
        """
        share = np.asarray(self.weights) / sum(self.weights)
        return [int(length) for length in generator.choice(self.lengths, count, p=share)]

    def __str__(self) -> str:
        if len(self.lengths) == 1:
            return str(self.lengths[0])
        return ",".join(f"{length}:{weight:g}" for length, weight in zip(self.lengths, self.weights, strict=True))


def _refusal(what: str, got: object, where: str) -> UsageError:
    allowed, fix = "be lengths of at least 1 with weights above 0, as LENGTH[:WEIGHT],...", "write 128, or 128:3,2048:1"
    return UsageError(word(what, got=got, allowed=allowed, where=where, fix=fix))
