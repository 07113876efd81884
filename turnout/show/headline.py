"""The key result of runs in words: who needs fewer bits, on what footing, and what it took."""

from collections.abc import Sequence

from turnout.measure.equal_time import equal_time, flops_ratio
from turnout.measure.ranking import Standing, standings, unranked
from turnout.measure.report import duration
from turnout.measure.runs import RunData, number

__all__ = ["at_equal_time", "headline"]


def headline(runs: Sequence[RunData]) -> str:
    """The key result in one sentence: a winner only among runs measured on the same text, with what it stands on."""
    known = standings(runs)
    why = unranked(runs)
    if why:
        shown = ", ".join(f"{one.name} {one.mean:.3f}" for one in known[:4])
        return f"Not ranked: {why}. Bits per byte, each on its own text: {shown}"
    if len(known) > 1:
        best, other = known[0], known[1]
        if f"{best.mean:.3f}" == f"{other.mean:.3f}":
            return f"{best.name} and {other.name} both need {best.mean:.3f} bits per byte on held-out text"
        seeds = "one seed each" if len(best.bits) == len(other.bits) == 1 else f"{other.name}: {_seeds(other)}"
        share = f"{100 * (1 - best.mean / other.mean):.1f} % less than {other.name}{_flops(best, other)}"
        apart = "" if other.mean - best.mean > best.spread + other.spread else ", which is within the spread of seeds"
        return f"{best.name} needs {best} on held-out text, {share} ({seeds}){apart}{_time(best, other)}"
    if known:
        return f"{known[0].name} needs {known[0]} on held-out text"
    for run in runs:
        losses = [loss for line in run.lines("train") if (loss := number(line.get("loss"))) is not None]
        if losses:
            return f"{run.name} has come to step {run.step:,}, at a loss of {losses[-1]:.3f} nats a token"
    return "Nothing has been measured yet"


def _flops(best: Standing, other: Standing) -> str:
    ratio = flops_ratio(best.runs, other.runs)
    if ratio is None:
        return ""
    return " at equal FLOPs" if abs(ratio - 1) < 0.005 else f" with {ratio:.2f} times the FLOPs"


def _seeds(one: Standing) -> str:
    return "one seed" if len(one.bits) == 1 else f"± {one.spread:.3f} over {len(one.bits)} seeds"


def _time(best: Standing, other: Standing) -> str:
    found = equal_time(best.runs, other.runs)
    if found is None:
        return ""
    return ", and took " + ("as long" if abs(found.times - 1) < 0.01 else f"{found.times:.2f} times as long")


def at_equal_time(runs: Sequence[RunData]) -> str:
    """Where the best two stood when the shorter training ended, in a sentence; empty where times do not compare.

    Source: none; ``equal_time`` in words.
    """
    known = standings(runs)
    if len(known) < 2 or unranked(runs):
        return ""
    best, other = known[0], known[1]
    found = equal_time(best.runs, other.runs)
    if found is None or abs(found.times - 1) < 0.01:
        return ""
    share = 100 * (found.bits / found.other_bits - 1)
    apart = "as many" if abs(share) < 0.05 else f"{abs(share):.1f} % {'more' if share > 0 else 'less'}"
    one = "one seed each" if len(best.runs) == len(other.runs) == 1 else "means over seeds"
    longer = best.name if found.times > 1 else other.name
    return (
        f"After {duration(found.seconds)}, when the shorter training ended, {best.name} needed {found.bits:.3f} bits "
        f"per byte in its evaluations, {apart} against the {found.other_bits:.3f} of {other.name} ({one}); {longer} "
        "was then in the middle of its learning-rate schedule."
    )
