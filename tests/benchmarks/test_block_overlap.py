"""Schedules of blocks on four ranks whose wire is slow: as long as the simulator says, in the order that it says."""

import pytest
from processes import spawn

from benchmarks.block_overlap import Trial, compare
from turnout.run.ranks.processes import Ranks

METHODS = ("none", "tutel", "turnout")


def compared(ranks: Ranks) -> dict[str, dict]:
    trial = Trial(attention_ms=48, gate_ms=8, experts_ms=64, wire_ms=72, start_ms=3, wire_start_ms=6)
    return compare(ranks, trial, rounds=3, methods=METHODS, degrees=(1, 3), repeats=1)


@pytest.mark.slow
def test_steps_on_a_slow_wire_are_as_long_as_the_simulator_says() -> None:
    # Other work on the machine makes steps longer, never shorter: so the shortest of each counts.
    found = spawn(4, compared, timeout_s=240)[0]
    least, predicted = {m: min(each) for m, each in found["measured_s"].items()}, found["predicted_s"]
    assert predicted["turnout"] < predicted["tutel"] < predicted["none"]
    assert least["turnout"] < 0.97 * least["tutel"] < 0.97 * 0.97 * least["none"], (least, predicted)
    errors = {method: predicted[method] / least[method] - 1 for method in METHODS}
    assert max(map(abs, errors.values())) < 0.1, errors
