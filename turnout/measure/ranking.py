"""Which runs may be ranked: those measured on the same held-out text; and over how many seeds a number stands."""

import dataclasses
import json
import statistics
from collections.abc import Sequence

from turnout.measure.runs import RunData

__all__ = ["Standing", "one_machine", "standings", "unranked"]

# What decides how fast a run trains, of what ``hardware`` tells.
_MACHINE = ("cpu", "cores", "accelerators", "threads", "mkldnn", "torch", "system")


@dataclasses.dataclass(frozen=True)
class Standing:
    """The runs of one configuration, which differ by their seeds at most.

    Args:
        name: of the first of them.
        bits: held-out bits per byte of each.
        runs: they themselves.

    Source: none; plain bookkeeping.
    """

    name: str
    bits: tuple[float, ...]
    runs: tuple[RunData, ...] = ()

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.bits)

    @property
    def spread(self) -> float:
        """The standard deviation over the seeds; 0 for one seed, which does not know it."""
        return statistics.stdev(self.bits) if len(self.bits) > 1 else 0.0

    def __str__(self) -> str:
        """The number, and what it stands on."""
        if len(self.bits) == 1:
            return f"{self.mean:.3f} bits per byte"
        return f"{self.mean:.3f} ± {self.spread:.3f} bits per byte over {len(self.bits)} seeds"


def unranked(runs: Sequence[RunData]) -> str:
    """Why these runs' numbers on held-out text cannot be ranked; empty where they can, or where there are no two.

    Runs are ranked when all that were measured name a common text (its digest, or that of the tokens made of it) and
    were measured on as many bytes of it. A run that does not say what it was measured on is not ranked.

    >>> one, two = (RunData(name, result={"bits_per_byte": 2.0}, texts=("a",)) for name in "xy")
    >>> unranked([one, two]), unranked([one, dataclasses.replace(two, texts=("b",))])
    ('', 'x and y were measured on different held-out texts')

    Source: none; plain bookkeeping.
    """
    known = [run for run in runs if run.bits_per_byte is not None]
    if len(known) < 2:
        return ""
    silent = [run.name for run in known if not run.texts]
    if silent:
        return f"{_and(silent)} {'does' if len(silent) == 1 else 'do'} not say which held-out text was measured"
    names = _and([run.name for run in known])
    if not set(known[0].texts).intersection(*(run.texts for run in known)):
        return f"{names} were measured on different held-out texts"
    sizes = [run.measured.get("bytes") for run in known]
    if len(set(sizes)) > 1:
        shown = _and(["an unknown number of" if size is None else f"{size:,}" for size in sizes])
        return f"{names} were measured on {shown} bytes of the held-out text"
    return ""


def one_machine(runs: Sequence[RunData]) -> bool:
    """Whether all are known to have run on one kind of machine with one torch: elsewhere speeds do not compare.

    Source: none; plain bookkeeping.
    """
    kinds = {json.dumps([run.hardware.get(key) for key in _MACHINE], default=str) for run in runs}
    return len(kinds) == 1 and all(run.hardware for run in runs)


def standings(runs: Sequence[RunData]) -> list[Standing]:
    """The measured runs by configuration, those that differ by ``train.seed`` alone together, the best mean first.

    >>> runs = [RunData(f"s{n}", {"train": {"seed": n}}, result={"bits_per_byte": 2.0 + n}) for n in range(2)]
    >>> print(standings(runs)[0])
    2.500 ± 0.707 bits per byte over 2 seeds

    Source: none; plain bookkeeping.
    """
    found: dict[str, list[RunData]] = {}
    for run in runs:
        if run.bits_per_byte is not None:
            found.setdefault(_kind(run), []).append(run)
    groups = [
        Standing(each[0].name, tuple(run.bits_per_byte or 0.0 for run in each), tuple(each)) for each in found.values()
    ]
    return sorted(groups, key=lambda group: group.mean)


def _kind(run: RunData) -> str:
    """The configuration without the seed; a run that does not say its seed is of a kind of its own."""
    train = run.config.get("train")
    if not isinstance(train, dict) or "seed" not in train:
        return f"alone: {id(run)}"
    rest = {key: run.config[key] for key in run.config if key in ("recipe", "data", "model")}
    settings = {key: value for key, value in train.items() if key != "seed"}
    return json.dumps([rest, settings], sort_keys=True, default=str)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
