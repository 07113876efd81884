"""Which differences between several arms are real, where all were measured on the same seeds."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
from scipy.special import stdtr, stdtrit

from turnout.errors import DataError, UnknownNameError, nearest, word
from turnout.expects import expects

__all__ = ["Difference", "paired_differences"]

_WHERE = "turnout.measure.paired_differences"


@dataclasses.dataclass(frozen=True)
class Difference:
    """An arm beside the one that all are compared with.

    Args:
        arm: its name.
        mean: of its values less the other's, seed by seed.
        low: of the interval.
        high: of the interval.
        p_value: how likely a difference as large is by chance, adjusted for the number of arms.

    >>> Difference("a", -0.2, -0.3, -0.1, 0.001).is_real
    True

    Source: none; plain bookkeeping.
    """

    arm: str
    mean: float
    low: float
    high: float
    p_value: float

    @property
    def is_real(self) -> bool:
        """Whether chance alone would show it in less than a twentieth of such tables."""
        return self.p_value < 0.05


@expects(values=Mapping)
def paired_differences(
    values: Mapping[str, Sequence[float]], *, against: str, confidence: float = 0.95
) -> tuple[Difference, ...]:
    """Every other arm less ``against``, seed by seed, with intervals.

    y = arm + seed + noise, with one variance of the noise for all arms: with A arms and S seeds it has
    (A - 1) (S - 1) degrees of freedom, so that three seeds of twenty arms say something, where three pairs alone do
    not. Intervals are of each difference by itself; p-values are Holm's, for all of them together. An arm whose noise
    is much larger than the others' makes the others' intervals too wide, never too narrow.

    Args:
        values: arm -> its numbers, one for each seed, in the same order of seeds.
        against: the arm that the others are compared with.
        confidence: of the intervals, above 0 and below 1.

    Returns:
        One for each other arm, in their order.

    Raises:
        DataError: arms with different numbers of seeds, fewer than two arms or seeds, or numbers that are not finite.
        UnknownNameError: ``against`` is none of the arms.

    >>> a, b = paired_differences({"x": [1.0, 2.0, 3.0], "y": [0.5, 1.6, 2.4], "z": [1.1, 2.0, 3.0]}, against="x")
    >>> a.is_real, b.is_real, round(a.mean, 3)
    (True, False, -0.5)

    Source: Fisher, 1935, "The Design of Experiments" (randomised blocks); Holm, 1979, "A Simple Sequentially Rejective
    Multiple Test Procedure".
    """
    if against not in values:
        raise _unknown(against, list(values))
    lengths = {len(row) for row in values.values()}
    if len(lengths) != 1 or min(lengths) < 2 or len(values) < 2:
        got = ", ".join(f"{name}: {len(row)}" for name, row in values.items())
        fix = "let every run of every seed end"
        raise DataError(
            word("values", got=got, allowed="be of two arms and seeds at least, all alike", where=_WHERE, fix=fix)
        )
    table_AS = np.array([list(row) for row in values.values()], dtype=np.float64)
    if not np.isfinite(table_AS).all():
        fix = "leave such runs out"
        raise DataError(word("values", got="others", allowed="be finite", where=_WHERE, fix=fix))
    arms, seeds = table_AS.shape
    left_AS = table_AS - table_AS.mean(1, keepdims=True) - table_AS.mean(0, keepdims=True) + table_AS.mean()
    freedom = (arms - 1) * (seeds - 1)
    error = float(np.sqrt(2 * np.square(left_AS).sum() / freedom / seeds))
    base = table_AS[list(values).index(against)]
    others = [name for name in values if name != against]
    mean_O = np.array([(table_AS[list(values).index(name)] - base).mean() for name in others])
    half = error * float(stdtrit(freedom, (1 + confidence) / 2))
    raw_O = np.array([_chance(float(mean), error, freedom) for mean in mean_O])
    holm_O = _holm(raw_O)
    return tuple(
        Difference(name, float(mean), float(mean - half), float(mean + half), float(p))
        for name, mean, p in zip(others, mean_O, holm_O, strict=True)
    )


def _chance(mean: float, error: float, freedom: int) -> float:
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return 2 * float(stdtr(freedom, -abs(mean) / error))


def _holm(raw_O: np.ndarray) -> np.ndarray:
    """p-values for all of them together: the smallest times their number, the next times one less, and so on."""
    order = np.argsort(raw_O, kind="stable")
    scaled = np.maximum.accumulate(raw_O[order] * np.arange(len(raw_O), 0, -1)).clip(max=1.0)
    found = np.empty_like(scaled)
    found[order] = scaled
    return found


def _unknown(against: str, names: Sequence[str]) -> UnknownNameError:
    return nearest(against, names, kind="arm", where=_WHERE)
