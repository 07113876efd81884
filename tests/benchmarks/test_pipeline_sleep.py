"""The pipeline simulator foretells real runs whose stages sleep."""

import pytest

from benchmarks.pipeline_sleep import RANKS, SCHEDULES, Report, Row, compare, costs, table
from turnout.recipes.spawned import spawned

JUDGED = ("GPipe", "1F1B", "ZB-H1", "Interleaved1F1B", "ZBV", "DualPipeV")
FEW = ("GPipe", "ZB-H1", "DualPipeV")  # of one stage a rank, also in halves, and of two
BOUND = {1: 0.05, 2: 0.10}  # by the number of stages of a rank


@pytest.mark.slow
def test_real_runs_are_not_shorter_than_is_simulated_and_overlap() -> None:
    """With the settings of the benchmark, whose bounds are for a machine without other work.

    What is slept is a bound anywhere: that of an action's own overhead is another at every moment of a busy machine.
    """
    report = spawned(RANKS, compare, list(FEW), 40.0, 1)
    assert [row.name for row in report.rows] == list(FEW)
    beside = f"load {report.load:.1f}, {1e3 * report.overhead_s:.2f} ms beside an action's own time"
    found = f"{beside}\n{table(report)}"
    assert report.overhead_s > 0, beside
    for row in report.rows:  # one stage after the other would take RANKS times as long, but for the ends
        assert row.slept_s <= row.measured_s < RANKS / 2 * row.simulated_s, found
        assert row.slept_s > 0.5 * row.simulated_s, found


def test_a_wrong_simulation_is_seen() -> None:
    assert Row("GPipe", 1, 1.0, 1.06, 1.0).error > BOUND[1]
    assert "6.0 %" in table(Report((Row("GPipe", 1, 1.0, 1.06, 1.0),), 0.0, 0.0))


def test_the_first_stage_does_both_gradients_at_once_as_torch_does() -> None:
    told = costs(4, (3.0, 2.0, 1.0), 0.5)
    assert told.full_S == (3.0,) * 4 and told.input_S[0] == 0.0
    assert all(name in SCHEDULES for name in JUDGED)
