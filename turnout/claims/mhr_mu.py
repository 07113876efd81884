"""Claim: the average of adapters that were trained with routing is a better start than one adapter trained without."""

from turnout.claims.claim import Claim, Row, Values
from turnout.claims.mhr import Tasks


def mhr_mu() -> Claim:
    """A new task with 16 examples, learned by one adapter: from MHR's average, and from one adapter of all tasks.

    Both have the same rank and are tuned in the same way, so that only the start differs.

    >>> mhr_mu().off
    'no routing: one adapter for all tasks'

    Source: Caccia et al., 2023, "Multi-Head Adapter Routing for Cross-Task Generalization".
    """
    metric, one = "held-out squared error over the variance, a new task", "one adapter for all tasks, tuned"
    return Claim(
        name="mhr_mu",
        statement="The average of adapters trained with routing, tuned as one, beats one adapter of all tasks.",
        source="Caccia et al., 2023, Multi-Head Adapter Routing for Cross-Task Generalization (MHR-mu)",
        off="no routing: one adapter for all tasks",
        switched={"mu": "one"},
        rows=(Row(metric, "below", "mu", "one", one),),
        measure=_measure,
        seconds=10,
        note="The tasks of the claim mhr. Their shifts are 0 in the mean: what an average carries is directions",
    )


def _measure(seed: int) -> Values:
    tasks = Tasks(seed)
    return {"mu": tasks.transfer(tasks.joint("mhr"), "mu"), "one": tasks.transfer(tasks.joint("one"), "all")}
