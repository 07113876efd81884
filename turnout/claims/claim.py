"""Claim: one published result, as it is measured here, with its mechanism on and off, and what counts as seeing it."""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch

from turnout.errors import UsageError, word

__all__ = ["PUBLISHED_SEEDS", "Claim", "Evidence", "Result", "Row"]

# What the table shows. Design and tuning look at seeds below 100 alone; nothing is changed after these were run.
PUBLISHED_SEEDS = (100, 101, 102, 103, 104)
FEWEST_SEEDS = 3  # fewer give numbers and no verdict
# One-sided 95 % quantiles of Student's t for n - 1 degrees of freedom, n = 2 to 10 paired seeds.
_T95 = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}

Note = Callable[[str], None] | None
Values = Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison that a claim makes, written down before anything is run.

    Args:
        metric: what the number is, with its unit; lower is better.
        relation: ``below``: measured is lower than the control, by more than the spread of the paired differences
            allows at 95 %. ``no_worse``: the mean difference plus that spread is at most ``margin``. ``within``:
            every measured value is at most ``bound``, and every control value is above it.
        measured: the name of the measured value.
        control: the name of the value it is held against.
        against: what the control is, in words.
        margin: for ``no_worse``, in the metric's unit: what a user would not mind.
        why: for ``no_worse``, why that much.
        bound: the limit, for ``within``.
        headline: whether this is the paper's own comparison rather than its mechanism against its off arm.

    Raises:
        UsageError: a margin that is not positive and finite, a bound or a margin that does not go with the relation.

    >>> Row("bits per byte", "no_worse", "bias", "loss", "auxiliary loss", margin=0.02, why="a seed's spread").margin
    0.02

    Source: none; plain bookkeeping.
    """

    metric: str
    relation: Literal["below", "no_worse", "within"]
    measured: str
    control: str
    against: str
    margin: float | None = None
    why: str = ""
    bound: float | None = None
    headline: bool = False

    def __post_init__(self) -> None:
        needs = {"below": (False, False), "no_worse": (True, False), "within": (False, True)}.get(self.relation)
        given = self.margin is not None, self.bound is not None
        if needs != given or bool(self.why) != given[0]:
            raise self._wrong(
                "relation, margin, why and bound",
                (self.relation, self.margin, self.why, self.bound),
                "be below alone, no_worse with a margin and why, or within with a bound",
                "give each relation what goes with it",
            )
        if self.margin is not None and not (math.isfinite(self.margin) and self.margin > 0):
            fix = "give what a user would not mind, or claim 'below'"
            raise self._wrong("margin", self.margin, "be positive and finite", fix)
        if self.bound is not None and not math.isfinite(self.bound):
            raise self._wrong("bound", self.bound, "be finite", "give the limit")

    def _wrong(self, what: str, got: object, allowed: str, fix: str) -> UsageError:
        return UsageError(word(what, got=got, allowed=allowed, where=f"the claim's row {self.metric!r}", fix=fix))


@dataclasses.dataclass(frozen=True)
class Evidence:
    """A row with its numbers, seed by seed.

    >>> row = Row("bits per byte", "below", "sparse", "dense", "dense")
    >>> Evidence(row, (2.0, 2.1, 2.0), (2.5, 2.5, 2.6)).holds, Evidence(row, (2.0, 2.9, 2.1), (2.5, 2.5, 2.2)).holds
    (True, False)

    Source: Student, 1908, "The Probable Error of a Mean": the paired, one-sided t bound.
    """

    row: Row
    measured: tuple[float, ...]
    control: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.measured) != len(self.control) or not 1 <= len(self.measured) <= 10:
            raise UsageError(
                word(
                    "the evidence",
                    got=f"{len(self.measured)} measured and {len(self.control)} control values",
                    allowed="have the same 1 to 10 seeds on both sides",
                    where=f"claim evidence {self.row.metric!r}",
                    fix="run both arms on the same seeds",
                )
            )

    @property
    def difference(self) -> float:
        """The mean of measured less control; NaN where a value is not finite."""
        if not all(map(math.isfinite, self.measured + self.control)):
            return math.nan
        return statistics.fmean(self.measured) - statistics.fmean(self.control)

    @property
    def spread(self) -> float:
        """How large a mean paired difference chance explains, one-sided at 95 %; NaN for one seed."""
        differences = [m - c for m, c in zip(self.measured, self.control, strict=True)]
        if len(differences) < 2 or not all(map(math.isfinite, differences)):
            return math.nan
        return _T95[len(differences) - 1] * statistics.stdev(differences) / math.sqrt(len(differences))

    @property
    def holds(self) -> bool:
        """Whether the relation is seen. A value that is not a number never holds, nor do fewer than three seeds."""
        if len(self.measured) < FEWEST_SEEDS or not all(map(math.isfinite, self.measured + self.control)):
            return False
        if self.row.bound is not None:
            return max(self.measured) <= self.row.bound < min(self.control)
        if self.row.margin is not None:
            return self.difference + self.spread <= self.row.margin
        return self.difference < -self.spread


@dataclasses.dataclass(frozen=True)
class Claim:
    """A published statement and how it is measured here: what is compared, and the mechanism switched off.

    Args:
        name: the name that ``turnout verify`` takes.
        statement: what the paper says, as it is measured here.
        source: authors, year, title.
        off: the off arm in words: the mechanism replaced by its trivial form.
        switched: measured value -> the same value of the off arm; every row of the mechanism has its measured value in
            it, and at least one compares the two.
        rows: the comparisons; those not marked ``headline`` are about the mechanism.
        measure: seed -> value by name, of all arms.
        seconds: roughly what one seed takes on one core.
        note: what a reader of the numbers must know; ``{name}`` is the mean of a value over the seeds.
        limits: what every value lies between, whatever the seed.
        simulated: whether what the paper times on hardware is computed here by a simulator instead.

    Raises:
        UsageError: a row of the mechanism that the off arm does not touch, or none held against it.

    Source: none; plain bookkeeping.
    """

    name: str
    statement: str
    source: str
    off: str
    switched: Mapping[str, str]
    rows: tuple[Row, ...]
    measure: Callable[[int], Values]
    seconds: float
    note: str = ""
    limits: tuple[float, float] = (0.0, 10.0)
    simulated: bool = False

    def __post_init__(self) -> None:
        mechanism = [row for row in self.rows if not row.headline]
        untouched = [row.metric for row in mechanism if row.measured not in self.switched]
        against_off = [row for row in mechanism if row.control == self.switched.get(row.measured)]
        if untouched or not any(row.relation != "no_worse" for row in against_off):
            raise UsageError(
                word(
                    f"the claim {self.name!r}",
                    got=f"rows of the mechanism that its off arm {self.off!r} leaves as they are: {untouched}",
                    allowed="measure its mechanism in every row and hold it below its off arm, or within, in one",
                    where="turnout.claims",
                    fix="name the off arm's value in switched, or mark the row headline",
                )
            )

    def run(self, *, seeds: Sequence[int] = PUBLISHED_SEEDS, note: Note = None) -> "Result":
        """Measures the claim on these seeds; ``note`` is told a line for each."""
        began, found = time.process_time(), []
        for seed in seeds:
            found.append(self.measure_one(seed))
            if note:
                note(f"{self.name}, seed {seed}: " + "; ".join(f"{name} {v:.4g}" for name, v in found[-1].items()))
        return Result(self, tuple(seeds), tuple(found), time.process_time() - began)

    def measure_one(self, seed: int) -> Values:
        """The values of one seed; the chance that no generator was given for comes from it too."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return {name: float(value) for name, value in self.measure(seed).items()}


@dataclasses.dataclass(frozen=True)
class Result:
    """A claim with what was measured of it.

    Source: none; plain bookkeeping.
    """

    claim: Claim
    seeds: tuple[int, ...]
    values: tuple[Values, ...]
    seconds: float = 0.0  # of processor time, on one core

    def all(self, name: str) -> tuple[float, ...]:
        """The values of this name, seed by seed."""
        return tuple(one[name] for one in self.values)

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        """Every row with its numbers."""
        return tuple(Evidence(row, self.all(row.measured), self.all(row.control)) for row in self.claim.rows)

    @property
    def mechanism(self) -> bool:
        """Whether every row of the mechanism holds."""
        return all(one.holds for one in self.evidence if not one.row.headline)

    @property
    def headline(self) -> bool | None:
        """Whether every row of the paper's headline holds; None where the mechanism's rows are all it says."""
        found = [one.holds for one in self.evidence if one.row.headline]
        return all(found) if found else None

    @property
    def holds(self) -> bool:
        """Whether every row holds."""
        return self.mechanism and self.headline is not False

    def switched_off(self) -> "Result":
        """The same claim where the method's values are those of its off arm."""
        values = tuple({name: one[self.claim.switched.get(name, name)] for name in one} for one in self.values)
        return dataclasses.replace(self, values=values)

    @property
    def note(self) -> str:
        """The claim's note with the means filled in."""
        names = self.values[0] if self.values else {}
        return self.claim.note.format_map({name: statistics.fmean(self.all(name)) for name in names})

    def to_json_dict(self) -> dict[str, object]:
        """What was measured as plain JSON values, with the verdicts that follow from it."""
        rows = [
            dataclasses.asdict(one.row)
            | {"measured": list(one.measured), "control": list(one.control)}
            | {"spread": _number(one.spread), "difference": _number(one.difference), "holds": one.holds}
            for one in self.evidence
        ]
        claim = {name: getattr(self.claim, name) for name in ("name", "statement", "source", "off")}
        claim |= {"simulated": True} if self.claim.simulated else {}
        verdicts = {"mechanism": self.mechanism, "headline": self.headline, "holds": self.holds}
        values = {name: list(self.all(name)) for name in self.values[0]}
        measured = {"note": self.note, "seeds": list(self.seeds), "values": values, "seconds": self.seconds}
        return claim | verdicts | measured | {"evidence": rows}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
