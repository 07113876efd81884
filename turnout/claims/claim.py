"""Claim: one published result, measured here against its own ablation over several seeds."""

import dataclasses
import math
import statistics
from typing import Literal

from turnout.errors import UsageError, word

# One-sided 95 % quantiles of Student's t for n - 1 degrees of freedom, n = 2 to 10 paired seeds.
_T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """One number, measured with the mechanism and without it, seed by seed.

    Args:
        metric: what the number is, with its unit.
        relation: ``below``: measured is lower than the control, by more than the spread of the paired
            differences allows at 95 %. ``not_above``: measured is not higher than the control by that much.
            ``within``: every measured value is at most ``bound``, and every control value is above it.
        measured: one value per seed, with the mechanism.
        control: one value per seed, in the same order, without it.
        control_name: what the control is.
        bound: the limit, for ``within`` only.

    >>> Evidence("bits per byte", "below", (2.0, 2.1, 2.0), (2.5, 2.5, 2.6), "dense").holds
    True
    >>> Evidence("bits per byte", "below", (2.0, 2.9, 2.1), (2.5, 2.5, 2.2), "dense").holds
    False

    Source: Student, 1908, "The Probable Error of a Mean": the paired, one-sided t bound.
    """

    metric: str
    relation: Literal["below", "not_above", "within"]
    measured: tuple[float, ...]
    control: tuple[float, ...]
    control_name: str
    bound: float | None = None

    def __post_init__(self) -> None:
        if len(self.measured) != len(self.control) or not 3 <= len(self.measured) <= 10:
            raise UsageError(
                word(
                    "the evidence",
                    got=f"{len(self.measured)} measured and {len(self.control)} control values",
                    allowed="have the same 3 to 10 seeds on both sides",
                    where=f"claim evidence {self.metric!r}",
                    fix="run both arms on at least three seeds",
                )
            )
        if (self.relation == "within") != (self.bound is not None):
            raise UsageError(
                word(
                    "bound",
                    got=self.bound,
                    allowed="be given exactly for the relation 'within'",
                    where=f"claim evidence {self.metric!r}",
                    fix="drop the bound, or compare 'within'",
                )
            )

    @property
    def spread(self) -> float:
        """How large a mean paired difference chance explains, one-sided at 95 %."""
        differences = [m - c for m, c in zip(self.measured, self.control, strict=True)]
        return _T95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))

    @property
    def holds(self) -> bool:
        """Whether the relation is seen. A value that is not a number never holds."""
        if not all(map(math.isfinite, self.measured + self.control)):
            return False
        if self.bound is not None:
            return max(self.measured) <= self.bound < min(self.control)
        difference = statistics.fmean(self.measured) - statistics.fmean(self.control)
        return difference < -self.spread if self.relation == "below" else difference <= self.spread


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published statement and the evidence for it from one run of ``turnout verify``.

    Args:
        name: the name that ``turnout verify`` takes.
        statement: what the paper says, as it is measured here.
        source: authors, year, title.
        evidence: what was measured; the claim holds when all of it does.
        seconds: wall-clock time of the run.
        note: what a reader of the numbers must know (sizes, differences from the paper).

    Source: none; plain bookkeeping.
    """

    name: str
    statement: str
    source: str
    evidence: tuple[Evidence, ...]
    seconds: float = 0.0
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether every piece of evidence holds."""
        return all(evidence.holds for evidence in self.evidence)

    def to_json_dict(self) -> dict[str, object]:
        """The claim as plain JSON values, verdicts included."""
        rows = [dataclasses.asdict(row) | {"spread": row.spread, "holds": row.holds} for row in self.evidence]
        return dataclasses.asdict(self) | {"evidence": rows, "holds": self.holds}
